"""Decode passes played back: all fused layers as one list of launches, with no Python between them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from trunkline.kernels.recording import Recording

from .attention import ForwardContext, packed_layout

if TYPE_CHECKING:
    from .fused import FusedLayer


class Scratch:
    """Float32 memory that layers use one after another: ``[rows, width]`` by name."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self._made: dict[tuple[str, int], torch.Tensor] = {}

    def __call__(self, name: str, width: int) -> torch.Tensor:
        key = name, width
        if key not in self._made:
            self._made[key] = torch.zeros(self.rows, width)
        return self._made[key]


class Decoding:
    """All layers over rows of one token each, recorded once for a pool and played back in every such pass."""

    def __init__(self, layers: Sequence[FusedLayer], trunk: ForwardContext, hidden: int, turned: int) -> None:
        """For up to twice the rows of ``trunk``; ``hidden`` and ``turned``: widths of ``x`` and of cos and sin."""
        self.pool, self.table = trunk.pool, trunk.layout.table
        self.capacity = rows = max(32, 2 * trunk.layout.rows)
        self.layout = packed_layout([1] * rows)
        self.layout.kv_len.fill(self.table.shape[1])  # launchers size their work by it
        self.layout.table, self.layout.decodes = self.table, rows
        self.layout.out_slots = torch.zeros(rows, dtype=torch.int64)
        self.scratch = Scratch(rows)
        self.x, self.cos, self.sin = (self.scratch(*key) for key in (("x", hidden), ("cos", turned), ("sin", turned)))
        context = ForwardContext(self.layout, self.pool, trunk.backend)
        self.recording = Recording()
        with self.recording:
            for layer in layers:
                layer.record(self.x, self.cos, self.sin, context, self.scratch)

    @staticmethod
    def fits(layers: Sequence[FusedLayer], x: torch.Tensor, trunk: ForwardContext) -> bool:
        """Can such a pass be played back?"""
        layout = trunk.layout
        return (
            trunk.pool is not None
            and layout.decodes == layout.rows
            and trunk.backend.name == "cpu"
            and x.dtype == trunk.pool.keys[0].dtype == torch.float32
            and all(layer.plain for layer in layers)
        )

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
