"""Decode-only passes as graphs: captured once for each padded number of rows, and replayed.

A GPU computes a small decode pass in less time than the host needs for its launches.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from trunkline.core.cache.pool import KVPool
from trunkline.core.engine.packing import PackedBatch
from trunkline.core.errors import describe_error
from trunkline.core.model.expert_watch import Choices, ExpertWatch
from trunkline.kernels.layout import Layout, LayoutTensors

from .base import Device, Graph
from .table import DeviceTable

log = logging.getLogger("trunkline.engine")

MOST_ROWS = 512  # of a graph; beyond, a pass takes longer than its launches
COLUMNS = ("ids", "positions", "slots", "kv_len", "table_row")
INPUTS = "decode"  # name of the uploaded array with these columns


class PackedForward(Protocol):
    """The part of a loaded model that is captured."""

    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor, layout: Layout, pool: KVPool | None, /
    ) -> torch.Tensor:
        """Ids and positions int64 ``[T]`` -> hidden rows ``[T, hidden_size]``."""


@dataclass(frozen=True, slots=True)
class Captured:
    """A graph over some number of rows; the tensors to which it writes."""

    graph: Graph
    hidden: torch.Tensor
    experts: Choices


class DecodeGraphs:
    """The graphs of one model. Rows that only pad a pass compute id 0 at position 0, in a slot that no request has."""

    def __init__(
        self,
        model: PackedForward,
        pool: KVPool,
        table: DeviceTable,
        device: Device,
        experts: ExpertWatch | None = None,
        *,
        rows: int,
    ) -> None:
        """For passes of up to ``rows`` rows."""
        self._model, self._pool, self._table, self._device, self._experts = model, pool, table, device, experts
        self.sizes = padded_sizes(rows)
        self._filler = np.array([[0], [0], [pool.slots], [1], [table.unused_row]], np.int64)
        # What the graphs read: their memory, of which smaller ones use the first columns.
        self._inputs = device.upload({INPUTS: np.repeat(self._filler, self.sizes[-1], axis=1)})[INPUTS].clone()
        self._captured: dict[int, Captured] = {}

    @torch.inference_mode()
    def capture(self, step: Callable[[], None] = lambda: None) -> None:
        """Capture a graph for each size. The largest is first, so that smaller ones find room in its memory.

        ``step`` is called before each.
        """
        for size in reversed(self.sizes):
            step()
            self._captured[size] = self._capture(size)

    @torch.inference_mode()
    def run_bounds(self) -> None:
        """Before any request: run passes of one row and of two, of one token and of as many as there may be.

        For passes that aren't graphs: kernels may have another variant for long rows, and for the strides of one token.
        """
        for rows in (1, 2):
            columns = dict(zip(COLUMNS, self._inputs[:, :1].repeat(1, rows), strict=True))
            columns["table_row"] = torch.zeros_like(columns["table_row"])  # there may be no other unused row
            for most in (1, self._table.host.max_len):
                self._forward(rows, columns, most, [], bounds=False)

    def inputs_for(self, packed: PackedBatch) -> dict[str, np.ndarray] | None:
        """What to upload for a pass in place of ``packed.arrays``; None if no graph can compute it."""
        arrays = packed.arrays
        if packed.decodes != len(packed.kv_len) or packed.decodes > self.sizes[-1] or not self._captured:
            return None
        if not arrays.keys() <= {"ids", "positions", "slots", "awaited", "sources"}:
            return None
        size = self.sizes[bisect_left(self.sizes, packed.decodes)]
        inputs = np.repeat(self._filler, size, axis=1)
        rows = (arrays["ids"], arrays["positions"], arrays["slots"], packed.kv_len, packed.table_row)
        inputs[:, : packed.decodes] = rows
        return {INPUTS: inputs, **{name: arrays[name] for name in ("awaited", "sources") if name in arrays}}

    def run(self, rows: int, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Hidden rows ``[rows, hidden_size]``. ``inputs``: what :meth:`inputs_for` gave, uploaded."""
        given = inputs[INPUTS]
        size = given.shape[1]
        self._inputs[:, :size] = given
        captured = self._captured[size]
        captured.graph.replay()
        # Copies: the next pass overwrites the graph's memory while these rows may still be on their way to the host.
        if self._experts is not None and self._experts.active:
            for layer, chosen in captured.experts:
                self._experts.observe(layer, chosen[:rows].clone())
        return captured.hidden[:rows].clone()

    def _capture(self, size: int) -> Captured:
        columns = dict(zip(COLUMNS, self._inputs[:, :size], strict=True))
        results: list[torch.Tensor] = []
        experts: Choices = []

        def run() -> None:
            results.clear()
            experts.clear()
            results.append(self._forward(size, columns, self._table.host.max_len, experts))

        graph = self._device.capture(run)
        return Captured(graph, results[0], experts)

    def _forward(
        self, size: int, columns: Mapping[str, torch.Tensor], most: int, experts: Choices, *, bounds: bool = True
    ) -> torch.Tensor:
        """The hidden rows of one pass; ``experts`` gets those that it chooses."""
        layout = self._layout(size, columns, most, bounds)
        with nullcontext() if self._experts is None else self._experts.noting(experts):
            return self._model.forward(columns["ids"], columns["positions"], layout, self._pool)

    def _layout(self, size: int, columns: Mapping[str, torch.Tensor], most: int, bounds: bool) -> Layout:
        """The layout of ``size`` rows of ``most`` tokens, or with ``bounds`` of at most as many.

        By these kernels divide their work; they read the lengths from its tensors.
        """
        starts = torch.arange(size + 1, dtype=torch.int32, device=self._device.kind)
        kv_len, table_row = (columns[name].to(torch.int32) for name in ("kv_len", "table_row"))
        return Layout(
            q_start=np.arange(size + 1, dtype=np.int32),
            kv_len=np.full(size, most, np.int32),
            table_row=np.full(size, self._table.unused_row, np.int32),
            table=self._table.host.slots,
            out_slots=columns["slots"],
            decodes=size,
            tensors=LayoutTensors(starts, kv_len, table_row, self._table.tensor),
            bounds=bounds,
        )


def padded_sizes(rows: int) -> list[int]:
    """The numbers of rows for which there is a graph, sorted: the last has room for ``rows``, but at most 512."""
    most = min(rows, MOST_ROWS)
    sizes = [1, 2, 4, *range(8, 257, 8), *range(272, MOST_ROWS + 1, 16)]
    return sizes[: bisect_left(sizes, most) + 1]


def capture_graphs(graphs: DecodeGraphs, name: str, step: Callable[[], None] = lambda: None) -> DecodeGraphs | None:
    """Capture them; None, with a warning, if the model ``name`` can't be captured."""
    try:
        graphs.capture(step)
    except Exception as error:  # what classes of models do that a graph can't have raises various exceptions
        log.warning("%s: no CUDA graphs, decoding is slower: %s", name, describe_error(error), exc_info=error)
        return None
    return graphs
