"""What expert observers are shown: which experts tokens are sent to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from msgspec import Struct

from .requests import Request

if TYPE_CHECKING:
    import torch


class ExpertLayers(Struct, frozen=True):
    """``layers``: the numbers of the decoder layers, of ``depth``, whose tokens choose among ``experts``.

    ``unseen`` says why choices can't be observed, "" where they can.
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
    """Sees the experts that tokens are sent to, one object per loaded model.

    Called in the engine's thread: ``begin_pass``, ``observe`` once per layer with experts,
    ``end_pass``. A pass that fails has no end, and its rows come again. One that raises misses
    the rest of the pass.
    """

    @property
    def active(self) -> bool:
        """Asked before each pass; while it is false the pass is not shown, which costs nothing."""

    def begin_pass(self, rows: Sequence[PassRow]) -> None:
        """A pass over these rows begins."""

    def observe(self, layer: int, chosen: torch.Tensor) -> None:
        """``chosen``: the experts of each packed token, int64 ``[T, k]``, in decoder layer ``layer``.

        On the model's device. Keep it if you like, don't change it, and don't wait for the device.
        """

    def end_pass(self) -> None:
        """All layers of the pass were shown, and its results are on the CPU."""
