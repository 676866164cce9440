"""Expert observers of mixture-of-experts models, and their arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from msgspec import Struct

from .requests import Request

if TYPE_CHECKING:
    import torch


class ExpertLayers(Struct, frozen=True):
    """The layers with experts: ``layers`` are their numbers among ``depth`` decoder layers, each has ``experts``.

    ``unseen``: the reason why their routing can't be observed, "" if it can.
    """

    layers: tuple[int, ...]
    depth: int
    experts: int
    unseen: str = ""


class PassRow(Protocol):
    """A request's share of a pass: its positions ``[start, end)``. Rows are packed one after another."""

    @property
    def request(self) -> Request:
        """``request.key`` is negative for the engine's own: health probes and warm-up."""

    @property
    def start(self) -> int:
        """The first position that the pass computes."""

    @property
    def end(self) -> int:
        """The position after the last one."""


class ExpertObserver(Protocol):
    """Observes to which experts tokens are sent; one object per loaded model.

    Called in the engine's thread when the results of a pass are there: ``begin_pass``, ``observe`` once per layer with
    experts, ``end_pass``. A pass that fails isn't observed, but only its rows when they are computed again. An observer
    that raises isn't called for the rest of the pass.
    """

    @property
    def active(self) -> bool:
        """Read before each pass is started. If it is false, the observer isn't called for this pass."""

    def begin_pass(self, rows: Sequence[PassRow]) -> None:
        """A pass over these rows was computed. Rows of requests that have ended meanwhile are left out."""

    def observe(self, layer: int, chosen: torch.Tensor) -> None:
        """``chosen``: the experts of each packed token, int64 ``[T, k]``, in decoder layer ``layer``.

        On the CPU. It may be kept, but not changed.
        """

    def end_pass(self) -> None:
        """All layers were observed."""
