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
from numba import njit, types
from numba.extending import intrinsic

from .elements import address
from .threads import OPTIONS, Task, claim, team_size
from .vectors import BYTES, INT, LANES, Vectors, all_lanes, generator

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
    for ``rows`` rows and one panel, in float32; weights are bfloat16 if ``half``.
    """
    line = PANEL * (2 if half else 4)  # bytes of one input's weights in a panel

    def typed(typing: Any, x: Any, weight: Any, addend: Any, out: Any, inputs: Any, xr: Any, sr: Any, outr: Any) -> Any:
        def emit(
            v: Vectors, x: Any, weight: Any, addend: Any, out: Any, inputs: Any, xr: Any, sr: Any, outr: Any
        ) -> None:
            starts = [v.at(x, xr, r) for r in range(rows)]
            panel = v.builder.mul(inputs, INT(line))

            def step(k: Any, sums: list[Any]) -> list[Any]:
                where, result = v.at(weight, line, k), []
                columns = [v.load(v.at(where, line // 2, i), half) for i in range(2)]
                # The next panel will be in the cache when its turn comes: the CPU doesn't see that it follows.
                v.prefetch(v.builder.add(where, panel))
                for r, start in enumerate(starts):
                    factor = v.spread_from(v.at(start, 4, k))
                    result += [v.fma(factor, column, sums[2 * r + i]) for i, column in enumerate(columns)]
                return result

            for n, total in enumerate(v.loop(inputs, [all_lanes(0.0)] * (2 * rows), step)):
                r, i = divmod(n, 2)
                # Added last: a large residual as the first summand would round off the small ones.
                first = v.load(v.at(v.at(addend, sr, r), BYTES, i))
                v.store(v.builder.fadd(total, first), v.at(v.at(out, outr, r), BYTES, i))

        return types.void(*[types.int64] * 8), generator(emit)

    return typed
