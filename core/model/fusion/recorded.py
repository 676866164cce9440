"""Decode-only passes, recorded once and replayed: all fused layers are one list of kernel launches without Python."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from trunkline.core.cache.pool import KVPool
from trunkline.core.model.attention import ForwardContext, packed_layout, paged_layout
from trunkline.kernels.cpu.recording import Recording

if TYPE_CHECKING:
    from trunkline.kernels.backend import Backend


class Scratch:
    """Scratch memory that all layers share: buffers ``[rows, width]`` by name and width."""

    def __init__(self, rows: int, dtype: torch.dtype) -> None:
        self.rows, self.dtype = rows, dtype
        self._made: dict[tuple[str, int], torch.Tensor] = {}

    def __call__(self, name: str, width: int) -> torch.Tensor:
        key = name, width
        if key not in self._made:
            self._made[key] = torch.zeros(self.rows, width, dtype=self.dtype)
        return self._made[key]


class Layer(Protocol):
    """The interface of a decoder layer over packed rows ``x`` [T, H], with ``cos`` and ``sin`` [T, R]."""

    @property
    def kv_shape(self) -> tuple[int, int, int]:
        """Number of KV heads, width of a key, width of a value."""

    @property
    def recordable(self) -> bool:
        """Whether :meth:`record` supports the layer."""

    def compute(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, trunk: ForwardContext) -> torch.Tensor: ...
    def record(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, trunk: ForwardContext, scratch: Scratch
    ) -> None:
        """:meth:`compute`, in place on ``x``; intermediate results are in ``scratch``."""


class RecordedDecode:
    """All layers over decoding rows, recorded once for a KV pool and replayed in every decode-only pass."""

    def __init__(self, layers: Sequence[Layer], trunk: ForwardContext, x: torch.Tensor, cos: torch.Tensor) -> None:
        """Record for up to twice the rows of ``trunk``; ``x`` and ``cos`` give the widths and dtype for :meth:`run`."""
        self.pool, self.table = trunk.pool, trunk.layout.table
        self.capacity = rows = max(32, 2 * trunk.layout.rows)
        self.layout = packed_layout([1] * rows)
        # The largest possible length: launches choose their number of threads by it.
        self.layout.kv_len.fill(self.table.shape[1])
        self.layout.table, self.layout.decodes = self.table, rows
        self.layout.out_slots = torch.zeros(rows, dtype=torch.int64)
        self.scratch = Scratch(rows, x.dtype)
        self.x, self.cos, self.sin = (
            self.scratch(name, like.shape[1]) for name, like in (("x", x), ("cos", cos), ("sin", cos))
        )
        context = ForwardContext(self.layout, self.pool, trunk.backend)
        self.recording = Recording()
        with self.recording:
            for layer in layers:
                layer.record(self.x, self.cos, self.sin, context, self.scratch)

    def covers(self, trunk: ForwardContext) -> bool:
        """Whether the recording fits the pass: it has the same pool and slot table, and enough rows."""
        layout = trunk.layout
        return trunk.pool is self.pool and layout.table is self.table and layout.rows <= self.capacity

    def run(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, trunk: ForwardContext) -> torch.Tensor:
        """``x`` [T, H], ``cos`` and ``sin`` [T, R] -> [T, H], which the next call overwrites."""
        rows, layout = len(x), trunk.layout
        self.layout.kv_len[:rows] = layout.kv_len
        self.layout.table_row[:rows] = layout.table_row
        self.layout.out_slots[:rows] = layout.out_slots
        self.x[:rows], self.cos[:rows], self.sin[:rows] = x, cos, sin
        self.recording.run(rows)
        return self.x[:rows]


def can_replay(
    layers: Sequence[Layer], hidden: int, rotary_dim: int, dtype: torch.dtype, backend: Backend, tolerance: float
) -> bool:
    """Whether :class:`RecordedDecode` supports these layers and gives the same results, on random inputs.

    ``hidden`` and ``rotary_dim``: widths of ``x`` and of cos and sin. ``tolerance``: bound of the largest
    difference, relative to the largest number.
    """
    if backend.name != "cpu" or not all(layer.recordable for layer in layers):
        return False
    rows, cached = 3, 5
    shapes = [layer.kv_shape for layer in layers]
    pool = KVPool(shapes, rows * (cached + 1), dtype, torch.device("cpu"))
    noise = torch.Generator().manual_seed(3)
    for tensor in (*pool.keys, *pool.values):
        tensor.normal_(generator=noise)
    table = np.arange(rows * (cached + 1), dtype=np.int32)[::-1].reshape(rows, -1).copy()
    trunk = ForwardContext(paged_layout(table, [(cached, cached + 1)] * rows), pool, backend)
    x, cos, sin = (torch.randn(rows, width, generator=noise).to(dtype) for width in (hidden, rotary_dim, rotary_dim))
    expected = x
    for layer in layers:
        expected = layer.compute(expected, cos, sin, trunk)
    played = RecordedDecode(layers, trunk, x, cos).run(x, cos, sin, trunk)
    return bool((played - expected).abs().max() <= tolerance * expected.abs().max())
