"""GEMM with packed weights on CPUs: ``x Wᵀ + addend``, x [M, K], W [N, K].

A decode pass reads every weight once for a handful of rows, so memory bandwidth limits its speed. If a
bfloat16 checkpoint is served in float32, its weights stay in bfloat16 and are converted in registers:
the results are the same, from half the bytes. CPUs with AVX512_BF16 also get the rows in bfloat16.

Weights are packed in panels of P output columns (BLIS calls them micro-panels). For float32 rows the
layout is ``[N / P, K, P]``, P = 16; for bfloat16 rows ``[N / P, K / 2, P, 2]``, P = 32, with two
neighbouring inputs side by side, as VDPBF16PS takes them. A unit of work is one panel times one block
of rows; threads claim units in the order of this loop nest::

    for each block of rows of x              L2: at most 256 KiB of x (BLOCK_BYTES); K = 576 in float32: 108 rows
      for each panel of W                    read from memory once per block of rows, then L1 or L2:
                                             16 columns, K = 576: 36 KiB in float32, 18 KiB in bfloat16
        for each tile of 6 rows (pairs: 12)  registers: 6 x 2 of 16 AVX (pairs: 12 x 2 of 32 AVX-512) accumulate
          for k in range(K)                  + 2 with weights, + 1 with a number of x in all lanes = 15 of 16 (27)
            load 2 vectors of the panel; prefetch the same place in the next panel to L2
            for each row: broadcast x[row, k]; 2 multiply-adds
          epilogue: + addend (bias or residual), round, store

A larger tile does more multiply-adds per load; these are the largest whose accumulators fit in the
registers beside the operands. BLOCK_BYTES is at most half of the L2 cache of server CPUs with AVX2
(512 KiB on Zen 2 and 3; 1 MiB and more on Zen 4 and on Intel since Skylake-SP).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from .elements import address
from .gemm_tiles import FLOAT_PANEL, PAIR_PANEL, float_panel, pair_panel
from .threads import Kernel, claim, team_size

_MIN_PARALLEL = 1 << 20  # multiply-adds; below, waking the other threads costs more than it saves
_CLAIM = 1 << 18  # multiply-adds that a thread claims at a time: enough to make the claim's cost negligible
BLOCK_BYTES = 256 << 10  # of x: a block of rows stays in the L2 cache while it is multiplied by all panels


class Arguments:
    """The kernel's arguments: addresses, sizes, strides in elements."""

    x: int
    weight: int
    addend: int
    addend_row: int  # elements from row to row; 0: one row for all (bias)
    out: int
    rows: int
    inputs: int
    outputs: int
    block: int  # rows of x of a unit of work
    claimed: int  # units that threads have claimed so far


def pack(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Pack ``weight`` [N, K] for float32 rows, stored as ``dtype``: [ceil(N / P), K, P], padded with zeros."""
    outputs, inputs = weight.shape
    panels = -(-outputs // FLOAT_PANEL)
    packed = torch.zeros(panels, inputs, FLOAT_PANEL, dtype=dtype)
    whole = outputs // FLOAT_PANEL
    packed[:whole] = weight[: whole * FLOAT_PANEL].view(whole, FLOAT_PANEL, inputs).transpose(1, 2)
    if whole < panels:
        packed[whole, :, : outputs - whole * FLOAT_PANEL] = weight[whole * FLOAT_PANEL :].t()
    return packed


def pack_pairs(weight: torch.Tensor) -> torch.Tensor:
    """Pack ``weight`` [N, K], K even, for bfloat16 rows: [ceil(N / P), K / 2, P, 2], padded with zeros."""
    outputs, inputs = weight.shape
    panels = -(-outputs // PAIR_PANEL)
    packed = torch.zeros(panels, inputs // 2, PAIR_PANEL, 2, dtype=torch.bfloat16)
    whole = outputs // PAIR_PANEL
    packed[:whole] = weight[: whole * PAIR_PANEL].view(whole, PAIR_PANEL, inputs // 2, 2).transpose(1, 2)
    if whole < panels:
        rest = weight[whole * PAIR_PANEL :]
        packed[whole, :, : len(rest)] = rest.view(len(rest), inputs // 2, 2).transpose(0, 1)
    return packed


def unpack(packed: torch.Tensor, rows: slice) -> torch.Tensor:
    """Rows ``rows`` of the weight [N, K] that was packed, in the dtype in which it is stored."""
    width = packed.shape[2]
    first = rows.start // width
    panels = packed[first : -(-rows.stop // width)]
    if packed.ndim == 4:
        panels = panels.transpose(2, 3).flatten(1, 2)
    return panels.transpose(1, 2).flatten(0, 1)[rows.start - first * width : rows.stop - first * width]


def width_of(packed: torch.Tensor) -> int:
    """Output columns of a packed weight, padding included: a multiple of the panel's width."""
    return packed.shape[0] * packed.shape[2]


def inputs_of(packed: torch.Tensor) -> int:
    """Inputs K of a packed weight."""
    return packed.shape[1] * (packed.shape[3] if packed.ndim == 4 else 1)


def rows_dtype(packed: torch.Tensor) -> torch.dtype:
    """The dtype of rows and addends for a packed weight: float32, or bfloat16 if it is packed in pairs."""
    return torch.float32 if packed.ndim == 3 else torch.bfloat16


def product_reference(x: torch.Tensor, packed: torch.Tensor, addend: torch.Tensor) -> torch.Tensor:
    """``x`` [M, K] times a packed weight, plus ``addend`` [N] or [M, N] -> [M, N] of ``x``'s dtype.

    N is :func:`width_of` the weight. Any float dtypes; computes in float32, or in float64 for a float64 ``x``.
    """
    exact = torch.promote_types(x.dtype, torch.float32)
    weight = packed.to(exact)
    if packed.ndim == 4:
        weight = weight.transpose(2, 3).flatten(1, 2)
    weight = weight.transpose(1, 2).reshape(-1, weight.shape[1])
    return (x.to(exact) @ weight.t() + addend.to(exact)).to(x.dtype)


def product(x: torch.Tensor, packed: torch.Tensor, addend: torch.Tensor, out: torch.Tensor) -> None:
    """:func:`product_reference`, compiled, written to ``out`` [M, N].

    All tensors are contiguous and on the CPU. ``x`` and ``addend`` are of :func:`rows_dtype`; ``out`` is
    too, or float32. Sums are float32. ``out`` may be ``addend`` itself. ValueError for anything else.
    """
    rows, inputs = x.shape
    outputs, kind = width_of(packed), rows_dtype(packed)
    if inputs != inputs_of(packed) or out.shape != (rows, outputs) or addend.shape[-1] != outputs:
        raise ValueError(f"x {tuple(x.shape)}, weights {tuple(packed.shape)} and out {tuple(out.shape)} don't fit")
    if addend.ndim == 2 and addend.shape[0] != rows:
        raise ValueError(f"addend has {addend.shape[0]} rows, x has {rows}")
    _kernel(kind, packed.dtype, out.dtype).run(
        team_size(packed.numel() * rows > _MIN_PARALLEL),
        x=address(x, "x", kind),
        weight=address(packed, "packed"),
        addend=address(addend, "addend", kind),
        addend_row=outputs if addend.ndim == 2 else 0,
        out=address(out, "out", torch.float32 if out.dtype == torch.float32 else kind),
        rows=rows,
        inputs=inputs,
        outputs=outputs,
        block=max(12, BLOCK_BYTES // (x.itemsize * inputs) // 12 * 12),
        claimed=0,
    )


@cache
def _kernel(kind: torch.dtype, stored: torch.dtype, result: torch.dtype) -> Kernel:
    """The kernel for rows of dtype ``kind``, weights stored as ``stored`` and results of dtype ``result``."""
    pairs = kind == torch.bfloat16
    panel = pair_panel(result == torch.float32) if pairs else float_panel(stored == torch.bfloat16)
    width, size = (PAIR_PANEL, 2) if pairs else (FLOAT_PANEL, stored.itemsize)

    def body(a: Any) -> None:
        panels = a.outputs // width
        units = panels * ((a.rows + a.block - 1) // a.block)
        chunk = max(1, min(_CLAIM // (width * a.inputs * min(a.rows, a.block)), panels // 16))
        first = claim(a, chunk)
        while first < units:
            for unit in range(first, min(first + chunk, units)):
                m, p = unit // panels * a.block, unit % panels
                panel(a, a.weight + p * a.inputs * width * size, m, min(m + a.block, a.rows), p * width)
            first = claim(a, chunk)

    return Kernel(body, Arguments)
