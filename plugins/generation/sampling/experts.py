"""Which experts the tokens of single requests are sent to, kept until the request ends."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from trunkline.core.errors import RequestError
from trunkline.core.types import ExpertLayers, Model, PassRow
from trunkline.plugins.generation.extras import dense_model_error

UNSEEN = -1  # in layers without experts, and where a pass was missed


class Choices:
    """The choices of one request at positions from ``start`` on. All below ``seen`` are known."""

    def __init__(self, start: int, depth: int) -> None:
        self.start = start
        self.seen = start
        self._depth = depth
        self._kept: npt.NDArray[np.int32] = np.empty((0, depth, 0), np.int32)

    def put(self, start: int, end: int, layer: int, chosen: npt.NDArray[np.int64]) -> None:
        """``chosen`` [end - start, k] of one layer. Positions that come again are written again."""
        skipped = max(0, self.start - start)
        if start + skipped >= end:
            return
        self._grow(end - self.start, chosen.shape[1])
        self._kept[start + skipped - self.start : end - self.start, layer] = chosen[skipped:]

    def take(self, end: int) -> npt.NDArray[np.int32]:
        """Those of the positions before ``end``, int32 ``[end - start, depth, k]``."""
        self._grow(end - self.start, self._kept.shape[2])
        return self._kept[: max(0, end - self.start)]

    def _grow(self, positions: int, k: int) -> None:
        room, _, before = self._kept.shape
        if positions <= room and k == before:
            return
        wider = np.full((max(positions, 2 * room), self._depth, k), UNSEEN, np.int32)
        if k == before:
            wider[:room] = self._kept
        self._kept = wider


class ChoiceKeeper:
    """An ExpertObserver that keeps what requests asked for; it looks on only while there are some."""

    def __init__(self, layers: ExpertLayers) -> None:
        self._depth = layers.depth
        self._asked: dict[int, Choices] = {}  # by request key
        self._rows: list[tuple[Choices, int, int, int]] = []  # of the pass: choices, start, end, packed index
        self._tokens = 0
        self._shown: dict[int, torch.Tensor] = {}

    @property
    def active(self) -> bool:
        return bool(self._asked)

    def keep(self, key: int, start: int) -> Choices:
        """From now on, keep the choices of a request at positions from ``start`` on."""
        self._asked[key] = Choices(start, self._depth)
        return self._asked[key]

    def keep_on(self, key: int, choices: Choices) -> None:
        """Go on with choices that were dropped while the request changed its stage."""
        self._asked[key] = choices

    def drop(self, key: int) -> None:
        """The request has ended."""
        self._asked.pop(key, None)

    def begin_pass(self, rows: Sequence[PassRow]) -> None:
        self._rows, self._shown, self._tokens = [], {}, 0
        for row in rows:
            if (choices := self._asked.get(row.request.key)) is not None:
                self._rows.append((choices, row.start, row.end, self._tokens))
            self._tokens += row.end - row.start

    def observe(self, layer: int, chosen: torch.Tensor) -> None:
        if self._rows:
            self._shown[layer] = chosen  # looked at when the pass is over: no waiting for the device before

    def end_pass(self) -> None:
        shown, self._shown = self._shown, {}
        for layer, tensor in shown.items():
            chosen = tensor.cpu().numpy()
            if len(chosen) != self._tokens:
                raise RuntimeError(f"{len(chosen)} tokens were routed in a pass of {self._tokens}")
            for choices, start, end, at in self._rows:
                choices.put(start, end, layer, chosen[at : at + end - start])
        for choices, start, end, _ in self._rows:
            if start <= choices.seen:
                choices.seen = max(choices.seen, end)


def keeper_of(model: Model) -> ChoiceKeeper:
    """The model's keeper. RequestError that says why there is none."""
    layers = model.expert_layers
    if layers is None:
        raise dense_model_error(model.name)
    if layers.unseen:
        raise RequestError(
            f"return_routed_experts: the expert choices of {model.name} can't be seen. {layers.unseen}",
            param="return_routed_experts",
        )
    return next(observer for observer in model.expert_observers if isinstance(observer, ChoiceKeeper))
