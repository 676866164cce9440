"""Matrix products with packed weights on CPUs: ``x Wᵀ + addend`` in float32.

Decoding reads every weight once for a handful of rows, so its speed is the memory's. A
checkpoint in bfloat16 that runs in float32 holds no more than 16 bits a weight: kept as such and
widened in registers, the same results come out of half the bytes.

Weights lie in panels of ``PANEL`` output columns, ``[N / PANEL, K, PANEL]``. A tile computes a
few rows of one panel with all its sums in registers; its code is written as vectors for LLVM,
because no loop vectoriser keeps a two-dimensional block of sums in registers.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.core.cgutils import get_or_insert_function
from numba.extending import intrinsic

from .elements import address
from .threads import OPTIONS, Task, claim, team_size

LANES = 8  # float32 numbers in an AVX register; LLVM splits or joins them for other CPUs
PANEL = 2 * LANES
ROWS = (6, 4, 2, 1)  # tile heights; 6 rows of a panel fill 12 of 16 registers with sums
_SERIAL = 1 << 20  # multiplications below which waking the other threads costs more than it saves
_CLAIM = 1 << 18  # multiplications that a thread claims at a time: as many as make the claim's cost vanish
BLOCK_BYTES = 256 << 10  # of x, so that it stays in the L2 cache while panels pass by

ARGUMENTS = [
    (name, np.int64)
    for name in ("x", "weight", "addend", "addend_row", "out", "rows", "inputs", "outputs", "block", "claimed")
]


def pack(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``weight`` [N, K] -> [ceil(N / PANEL), K, PANEL] of ``dtype``, the last panel filled up with zeros."""
    outputs, inputs = weight.shape
    panels = -(-outputs // PANEL)
    packed = torch.zeros(panels, inputs, PANEL, dtype=dtype)
    whole = outputs // PANEL
    packed[:whole] = weight[: whole * PANEL].view(whole, PANEL, inputs).transpose(1, 2)
    if whole < panels:
        packed[whole, :, : outputs - whole * PANEL] = weight[whole * PANEL :].t()
    return packed


def product_reference(x: torch.Tensor, packed: torch.Tensor, addend: torch.Tensor) -> torch.Tensor:
    """``x`` [M, K] times packed weights plus ``addend`` ([N] or [M, N]), N a multiple of PANEL."""
    weight = packed.to(x.dtype).transpose(1, 2).reshape(-1, packed.shape[1])
    return x @ weight.t() + addend


def product(x: torch.Tensor, packed: torch.Tensor, addend: torch.Tensor, out: torch.Tensor) -> None:
    """:func:`product_reference` into ``out`` [M, N], compiled.

    All float32 and contiguous, ``packed`` also bfloat16. ``out`` may be ``addend`` itself.
    """
    rows, inputs = x.shape
    outputs = packed.shape[0] * PANEL
    if packed.shape[1:] != (inputs, PANEL) or out.shape != (rows, outputs) or addend.shape[-1] != outputs:
        raise ValueError(f"x {tuple(x.shape)}, weights {tuple(packed.shape)} and out {tuple(out.shape)} don't fit")
    if addend.ndim == 2 and addend.shape[0] != rows:
        raise ValueError(f"addend has {addend.shape[0]} rows, x has {rows}")
    arguments = (
        address(x, "x", torch.float32),
        address(packed, "packed"),
        address(addend, "addend", torch.float32),
        outputs if addend.ndim == 2 else 0,
        address(out, "out", torch.float32),
        rows,
        inputs,
        outputs,
        max(6, BLOCK_BYTES // (4 * inputs) // 6 * 6),
        0,
    )
    _task(packed.dtype).run(arguments, team_size(packed.numel() * rows > _SERIAL))


@cache
def _task(dtype: torch.dtype) -> Task:
    half = dtype == torch.bfloat16
    size = 2 if half else 4
    tile6, tile4, tile2, tile1 = (intrinsic(_tile(rows, half)) for rows in ROWS)

    def panel(a: Any, weight: int, first: int, last: int, column: int) -> None:
        """Rows ``[first, last)`` of one panel. Rows are split so that no lone one is left where that can be helped."""
        x_row, out_row = a.inputs * 4, a.outputs * 4
        m = first
        while m < last:
            x, out = a.x + m * x_row, a.out + m * out_row + column * 4
            addend, left = a.addend + (m * a.addend_row + column) * 4, last - m
            if left >= 6 and left != 8:
                tile6(x, weight, addend, out, a.inputs, x_row, a.addend_row * 4, out_row)
                m += 6
            elif left >= 4:
                tile4(x, weight, addend, out, a.inputs, x_row, a.addend_row * 4, out_row)
                m += 4
            elif left >= 2:
                tile2(x, weight, addend, out, a.inputs, x_row, a.addend_row * 4, out_row)
                m += 2
            else:
                tile1(x, weight, addend, out, a.inputs, x_row, a.addend_row * 4, out_row)
                m += 1

    compiled = njit(**OPTIONS)(panel)

    def body(a: Any) -> None:
        panels = a.outputs // PANEL
        units = panels * ((a.rows + a.block - 1) // a.block)
        chunk = max(1, min(_CLAIM // (PANEL * a.inputs * min(a.rows, a.block)), panels // 16))
        first = claim(a, chunk)
        while first < units:
            for unit in range(first, min(first + chunk, units)):
                m, p = unit // panels * a.block, unit % panels
                compiled(a, a.weight + p * a.inputs * PANEL * size, m, min(m + a.block, a.rows), p * PANEL)
            first = claim(a, chunk)

    return Task(body, ARGUMENTS)


def _tile(rows: int, half: bool) -> Any:
    """An intrinsic ``tile(x, weight, addend, out, inputs, x_row, addend_row, out_row)``.

    Addresses and row lengths in bytes: ``out[r] = addend[r] + sum over k of x[r, k] * weight[k]``
    for ``rows`` rows and one panel.
    """

    def typed(typing: Any, x: Any, weight: Any, addend: Any, out: Any, inputs: Any, xr: Any, sr: Any, outr: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            _Tile(builder, rows, half).emit(*values)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 8), generate

    return typed


class _Tile:
    """Emits a tile's code: ``rows`` x 2 vectors of sums, one loop over the inputs."""

    WIDE = ir.VectorType(ir.FloatType(), LANES)
    INT = ir.IntType(64)

    def __init__(self, builder: Any, rows: int, half: bool) -> None:
        self.builder, self.rows, self.half = builder, rows, half
        self.line = self.INT(PANEL * (2 if half else 4))  # bytes of one input's weights in a panel
        kind = ir.FunctionType(self.WIDE, [self.WIDE] * 3)
        self.fma = get_or_insert_function(builder.module, kind, f"llvm.fmuladd.v{LANES}f32")

    def emit(self, x: Any, weight: Any, addend: Any, out: Any, inputs: Any, xr: Any, sr: Any, outr: Any) -> None:
        builder = self.builder
        rows = [self._at(x, xr, r) for r in range(self.rows)]
        before = builder.block
        loop, after = builder.append_basic_block("inputs"), builder.append_basic_block("store")
        builder.branch(loop)
        builder.position_at_end(loop)
        k = builder.phi(self.INT)
        k.add_incoming(self.INT(0), before)
        sums = [[builder.phi(self.WIDE), builder.phi(self.WIDE)] for _ in rows]
        line = builder.add(weight, builder.mul(k, self.line))
        columns = self._weights(line)
        self._prefetch(builder.add(line, builder.mul(inputs, self.line)))
        following = builder.add(k, self.INT(1))
        k.add_incoming(following, loop)
        for row, phis in zip(rows, sums, strict=True):
            factor = self._spread(builder.add(row, builder.mul(k, self.INT(4))))
            for column, phi in zip(columns, phis, strict=True):
                phi.add_incoming(self.WIDE([0.0] * LANES), before)
                phi.add_incoming(builder.call(self.fma, [factor, column, phi]), loop)
        builder.cbranch(builder.icmp_signed("<", following, inputs), loop, after)
        builder.position_at_end(after)
        for r, phis in enumerate(sums):
            # Added last: a large residual as the first summand would round off the small ones.
            for i, first in enumerate(self._vectors(self._at(addend, sr, r))):
                where = builder.add(self._at(out, outr, r), self.INT(4 * LANES * i))
                total = builder.fadd(phis[i].incomings[1][0], first)
                builder.store(total, self._pointer(where, self.WIDE), align=4)

    def _at(self, base: Any, row: Any, r: int) -> Any:
        return self.builder.add(base, self.builder.mul(row, self.INT(r)))

    def _pointer(self, where: Any, kind: Any) -> Any:
        return self.builder.inttoptr(where, kind.as_pointer())

    def _vectors(self, where: Any) -> list[Any]:
        """Two float32 vectors, side by side in memory."""
        places = [self.builder.add(where, self.INT(4 * LANES * i)) for i in range(2)]
        return [self.builder.load(self._pointer(place, self.WIDE), align=4) for place in places]

    def _weights(self, where: Any) -> list[Any]:
        """One input's weights in a panel: two vectors, widened when they are bfloat16."""
        if not self.half:
            return self._vectors(where)
        builder, bits = self.builder, ir.VectorType(ir.IntType(32), LANES)
        wide = []
        for i in range(2):
            place = self._pointer(builder.add(where, self.INT(2 * LANES * i)), ir.VectorType(ir.IntType(16), LANES))
            moved = builder.shl(builder.zext(builder.load(place, align=2), bits), bits([16] * LANES))
            wide.append(builder.bitcast(moved, self.WIDE))
        return wide

    def _prefetch(self, where: Any) -> None:
        """Have the next panel in the L2 cache when its turn comes: the CPU doesn't see that it follows."""
        byte, i32 = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, i32, i32, i32])
        function = get_or_insert_function(self.builder.module, kind, "llvm.prefetch.p0i8")
        self.builder.call(function, [self._pointer(where, ir.IntType(8)), i32(0), i32(2), i32(1)])

    def _spread(self, where: Any) -> Any:
        """One number of ``x`` in all lanes."""
        builder, lanes = self.builder, ir.VectorType(ir.IntType(32), LANES)
        undefined = ir.Constant(self.WIDE, ir.Undefined)
        single = builder.insert_element(
            undefined, builder.load(self._pointer(where, ir.FloatType())), ir.IntType(32)(0)
        )
        return builder.shuffle_vector(single, undefined, lanes([0] * LANES))
