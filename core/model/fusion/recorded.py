"""Decode passes recorded once and replayed: all fused layers as one list of kernel calls, without Python between."""

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
    """Memory that layers use one after another: ``[rows, width]`` by name."""

    def __init__(self, rows: int, dtype: torch.dtype) -> None:
        self.rows, self.dtype = rows, dtype
        self._made: dict[tuple[str, int], torch.Tensor] = {}

    def __call__(self, name: str, width: int) -> torch.Tensor:
        key = name, width
        if key not in self._made:
            self._made[key] = torch.zeros(self.rows, width, dtype=self.dtype)
        return self._made[key]


class Layer(Protocol):
    """What is recorded: a decoder layer over packed rows ``x`` [T, H], with ``cos`` and ``sin`` [T, R]."""

    @property
    def kv_shape(self) -> tuple[int, int, int]:
        """Heads of keys and values, width of a key, width of a value."""

    @property
    def plain(self) -> bool:
        """Can :meth:`record` do it?"""

    def step(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, trunk: ForwardContext) -> torch.Tensor: ...
    def record(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, trunk: ForwardContext, scratch: Scratch
    ) -> None:
        """:meth:`step`, in place on ``x``, in memory that ``scratch`` owns."""


class Decoding:
    """All layers over rows of one token each, recorded once for a pool and played back in every such pass."""

    def __init__(self, layers: Sequence[Layer], trunk: ForwardContext, x: torch.Tensor, cos: torch.Tensor) -> None:
        """For up to twice the rows of ``trunk``, of which ``x`` and ``cos`` are like those of :meth:`run`."""
        self.pool, self.table = trunk.pool, trunk.layout.table
        self.capacity = rows = max(32, 2 * trunk.layout.rows)
        self.layout = packed_layout([1] * rows)
        self.layout.kv_len.fill(self.table.shape[1])  # launchers size their work by it
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
        """Was it recorded for this pool, and for as many rows?"""
        layout = trunk.layout
        return trunk.pool is self.pool and layout.table is self.table and layout.rows <= self.capacity

    def run(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, trunk: ForwardContext) -> torch.Tensor:
        """``x`` [T, H], ``cos`` and ``sin`` [T, R] -> [T, H], which is valid until the next pass."""
        rows, layout = len(x), trunk.layout
        self.layout.kv_len[:rows] = layout.kv_len
        self.layout.table_row[:rows] = layout.table_row
        self.layout.out_slots[:rows] = layout.out_slots
        self.x[:rows], self.cos[:rows], self.sin[:rows] = x, cos, sin
        self.recording.run(rows)
        return self.x[:rows]


def plays_back(
    layers: Sequence[Layer], hidden: int, turned: int, dtype: torch.dtype, backend: Backend, tolerance: float
) -> bool:
    """Can :class:`Decoding` do these layers? It must give what they give one by one, on noise.

    ``hidden`` and ``turned``: widths of ``x`` and of cos and sin; ``tolerance``: of the largest
    difference, relative to the largest number.
    """
    if backend.name != "cpu" or not all(layer.plain for layer in layers):
        return False
    rows, cached = 3, 5
    shapes = [layer.kv_shape for layer in layers]
    pool = KVPool(shapes, rows * (cached + 1), dtype, torch.device("cpu"))
    noise = torch.Generator().manual_seed(3)
    for tensor in (*pool.keys, *pool.values):
        tensor.normal_(generator=noise)
    table = np.arange(rows * (cached + 1), dtype=np.int32)[::-1].reshape(rows, -1).copy()
    trunk = ForwardContext(paged_layout(table, [(cached, cached + 1)] * rows), pool, backend)
    x, cos, sin = (torch.randn(rows, width, generator=noise).to(dtype) for width in (hidden, turned, turned))
    expected = x
    for layer in layers:
        expected = layer.step(expected, cos, sin, trunk)
    played = Decoding(layers, trunk, x, cos).run(x, cos, sin, trunk)
    return bool((played - expected).abs().max() <= tolerance * expected.abs().max())
