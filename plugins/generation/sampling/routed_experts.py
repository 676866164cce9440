"""Captures to which experts the tokens of single requests are routed, for ``return_routed_experts``."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from trunkline.core.errors import RequestError
from trunkline.core.types import ExpertLayers, Model, PassRow
from trunkline.plugins.generation.extras import dense_model_error

MISSING = -1  # in layers without experts, and at positions of a pass that wasn't observed


class RoutedExperts:
    """The experts of one request's tokens at positions from ``start`` on.

    Positions ``[start, known_end)`` are complete. Later ones may be missing after a pass that wasn't observed.
    """

    def __init__(self, start: int, depth: int) -> None:
        """``depth``: number of decoder layers."""
        self.start = start
        self.known_end = start
        self._depth = depth
        self._ids: npt.NDArray[np.int32] = np.empty((0, depth, 0), np.int32)

    def write(self, start: int, end: int, layer: int, ids: npt.NDArray[np.int64]) -> None:
        """Store the expert ids ``[end - start, k]`` of one layer. Positions that are computed again are overwritten."""
        skipped = max(0, self.start - start)
        if start + skipped >= end:
            return
        self._grow(end - self.start, ids.shape[1])
        self._ids[start + skipped - self.start : end - self.start, layer] = ids[skipped:]

    def read(self, end: int) -> npt.NDArray[np.int32]:
        """Expert ids of positions before ``end``, int32 ``[end - start, depth, k]``."""
        self._grow(end - self.start, self._ids.shape[2])
        return self._ids[: max(0, end - self.start)]

    def _grow(self, positions: int, k: int) -> None:
        capacity, _, old_k = self._ids.shape
        if positions <= capacity and k == old_k:
            return
        larger = np.full((max(positions, 2 * capacity), self._depth, k), MISSING, np.int32)
        if k == old_k:
            larger[:capacity] = self._ids
        self._ids = larger


class RoutedExpertsCapturer:
    """An ExpertObserver that stores the experts of requests that ask for them; inactive while there are none."""

    def __init__(self, layers: ExpertLayers) -> None:
        self._depth = layers.depth
        self._captured: dict[int, RoutedExperts] = {}  # by request key
        self._rows: list[tuple[RoutedExperts, int, int, int]] = []  # of the pass: experts, start, end, packed index
        self._tokens = 0
        self._observed: dict[int, torch.Tensor] = {}  # by layer

    @property
    def active(self) -> bool:
        return bool(self._captured)

    def start(self, key: int, start: int) -> RoutedExperts:
        """Begin to capture the experts of a request, at positions from ``start`` on."""
        self._captured[key] = RoutedExperts(start, self._depth)
        return self._captured[key]

    def resume(self, key: int, experts: RoutedExperts) -> None:
        """Continue after :meth:`stop`, for a request that was handed to another stage meanwhile."""
        self._captured[key] = experts

    def stop(self, key: int) -> None:
        """Capture nothing more of a request. Does nothing if it isn't captured."""
        self._captured.pop(key, None)

    def begin_pass(self, rows: Sequence[PassRow]) -> None:
        self._rows, self._observed, self._tokens = [], {}, 0
        for row in rows:
            if (experts := self._captured.get(row.request.key)) is not None:
                self._rows.append((experts, row.start, row.end, self._tokens))
            self._tokens += row.end - row.start

    def observe(self, layer: int, chosen: torch.Tensor) -> None:
        if self._rows:
            self._observed[layer] = chosen

    def end_pass(self) -> None:
        observed, self._observed = self._observed, {}
        for layer, tensor in observed.items():
            ids = tensor.numpy()
            if len(ids) != self._tokens:
                raise RuntimeError(f"{len(ids)} tokens were routed in a pass of {self._tokens}")
            for experts, start, end, offset in self._rows:
                experts.write(start, end, layer, ids[offset : offset + end - start])
        for experts, start, end, _ in self._rows:
            if start <= experts.known_end:
                experts.known_end = max(experts.known_end, end)


def capturer_of(model: Model) -> RoutedExpertsCapturer:
    """The capturer of a model. RequestError if the model has no experts, or experts that can't be observed."""
    layers = model.expert_layers
    if layers is None:
        raise dense_model_error(model.name)
    if layers.unseen:
        raise RequestError(
            f"return_routed_experts: the expert choices of {model.name} can't be seen. {layers.unseen}",
            param="return_routed_experts",
        )
    return next(observer for observer in model.expert_observers if isinstance(observer, RoutedExpertsCapturer))
