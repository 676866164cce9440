"""GEMM with packed weights on CPUs: ``x Wᵀ + addend``, x [M, K], W [N, K].

A decode pass reads every weight once for a handful of rows, so memory bandwidth limits its speed. If a
bfloat16 checkpoint is served in float32, its weights stay in bfloat16 and are converted in registers:
the results are the same, from half the bytes. CPUs with AVX512_BF16 also get the rows in bfloat16.

Weights are packed in panels of P output columns (BLIS calls them micro-panels). For float32 rows the
layout is ``[N / P, K, P]``, P = 16; for bfloat16 rows ``[N / P, K / 2, P, 2]``, P = 32, with two
neighbouring inputs side by side, as VDPBF16PS takes them. A unit of work is a block of rows times some
panels; threads claim units in the order of this loop nest::

    for each block of rows of x              L2: at most 256 KiB of x (BLOCK_BYTES); K = 576 in float32: 108 rows
      for each panel of W                    read from memory once per block of rows, then L1 or L2:
                                             16 columns, K = 576: 36 KiB in float32, 18 KiB in bfloat16
        for each tile of 6 rows (pairs: 12)  registers: 6 x 2 of 16 AVX (pairs: 12 x 2 of 32 AVX-512) accumulate
          for k in range(K)                  + 2 with weights, + 1 with a number of x in all lanes = 15 of 16 (27)
            load 2 vectors of the panel; prefetch the same place in the next panel to L2
            for each row: broadcast x[row, k]; 2 multiply-adds
          epilogue: + addend (bias or residual), round, store

With a large K, a block would have few rows, so that W is read from memory many times; rows that are a power
of two apart also compete for the same sets of the caches. Then K is divided into parts (:class:`Parts`)::

    for each block of rows of x              120 rows
      for each group of panels               at most 16: 256 columns (pairs: 512); one unit
        for each part of K                   at most 2 KiB of a row
          copy x[block, part] together       L2: 240 KiB
          for each panel of the group        L1 or L2: 16 columns x 512: 32 or 16 KiB (pairs: 32 x 1024: 64 KiB)
            for each tile                    begins with the sums of the parts before, in L2: 120 KiB (pairs: 240)

Each sum is added in order of k, whatever the rows, parts and threads: a row's results don't depend on the
rows beside it, bit for bit.

A larger tile does more multiply-adds per load; these are the largest whose accumulators fit in the
registers beside the operands. BLOCK_BYTES is at most half of the L2 cache of server CPUs with AVX2
(512 KiB on Zen 2 and 3; 1 MiB and more on Zen 4 and on Intel since Skylake-SP).
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import njit

from .elements import address
from .gemm_tiles import CACHE_LINE, CONTINUE, FINISH, FLOAT_PANEL, PAIR_PANEL, float_panel, pair_panel
from .launches.memory import scratch_memory
from .threads import OPTIONS, Kernel, claim, int32s, team_size, thread, threads
from .units import SHARES, TILE, even_block, for_each_unit

_MIN_PARALLEL = 1 << 18  # multiply-adds; below, waking the other threads costs more than it saves
BLOCK_BYTES = 256 << 10  # of x: a block of rows stays in the L2 cache while it is multiplied by all panels
PART = 2 << 10  # bytes of a part of a row, at most
_WHOLE = 1536  # inputs up to which K isn't divided
_GROUP = 16  # panels of a group, at most
_FEW_ROWS = 12  # up to which K isn't divided: one tile reads each weight once


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
    part: int  # inputs that are multiplied at a time
    group: int  # panels of a unit, where K is divided
    scratch: int  # where K is divided: each thread's copy of a part of x, and its sums
    scratch_size: int  # bytes of one thread
    claimed: int  # units that threads have claimed so far


class Parts(NamedTuple):
    """How a product is divided; the fields of :class:`Arguments` with these names."""

    block: int
    part: int
    group: int
    scratch_size: int  # 0: K isn't divided


def divide(inputs: int, size: int, panel: int) -> Parts:
    """How to divide a product of ``inputs`` inputs of ``size`` bytes each, by panels of ``panel`` columns."""
    parts = -(-inputs * size // PART) if inputs > _WHOLE else 1
    part = inputs if parts == 1 else -(-inputs // parts // 8) * 8
    block = max(TILE, BLOCK_BYTES // (size * part) // TILE * TILE)
    scratch = block * (part * size + CACHE_LINE) + block * _GROUP * panel * 4
    return Parts(block, part, _GROUP, scratch if parts > 1 else 0)


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
    parts = divide(inputs, x.itemsize, packed.shape[2])
    scratch = scratch_memory(team_size() * parts.scratch_size if rows > _FEW_ROWS else 0, of_threads=True)
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
        **parts._asdict(),
        scratch=scratch.data_ptr(),
        claimed=0,
    )


@cache
def _kernel(kind: torch.dtype, stored: torch.dtype, result: torch.dtype) -> Kernel:
    """The kernel for rows of dtype ``kind``, weights stored as ``stored`` and results of dtype ``result``."""
    pairs = kind == torch.bfloat16
    panel = pair_panel(result == torch.float32) if pairs else float_panel(stored == torch.bfloat16)
    width, size, x_size = (PAIR_PANEL, 2, 2) if pairs else (FLOAT_PANEL, stored.itemsize, 4)

    def whole(a: Any, p: int, first: int, last: int) -> None:
        """All inputs at once; a unit is one panel."""
        x_row = a.inputs * x_size
        weight = a.weight + p * a.inputs * width * size
        panel(a, a.x + first * x_row, x_row, weight, a.inputs, first, last, p * width, 0, FINISH)

    def divided(a: Any, panels: int) -> None:
        """Inputs in several parts; a unit is a group of panels."""
        block = even_block(a)
        blocks = (a.rows + block - 1) // block
        group = max(1, min(a.group, panels * blocks // (SHARES * threads())))
        groups = (panels + group - 1) // group
        x_row = a.part * x_size + CACHE_LINE
        x = a.scratch + np.int64(thread()) * a.scratch_size
        sums = x + a.block * x_row
        unit = claim(a, 1)
        while unit < blocks * groups:
            m, first = unit // groups * block, unit % groups * group
            last, end = min(m + block, a.rows), min(first + group, panels)
            for k in range(0, a.inputs, a.part):
                inputs = min(a.part, a.inputs - k)
                for row in range(m, last):
                    source, target = int32s(a.x + (row * a.inputs + k) * x_size), int32s(x + (row - m) * x_row)
                    for i in range(inputs * x_size // 4):
                        target[i] = source[i]
                flags = (CONTINUE if k > 0 else 0) + (FINISH if k + inputs == a.inputs else 0)
                for p in range(first, end):
                    weight = a.weight + (p * a.inputs + k) * width * size
                    kept = sums + (p - first) * block * width * 4
                    panel(a, x, x_row, weight, inputs, m, last, p * width, kept, flags)
            unit = claim(a, 1)

    each, divided = for_each_unit(width, whole), njit(**OPTIONS)(divided)

    def body(a: Any) -> None:
        if a.rows > _FEW_ROWS and a.part < a.inputs:
            divided(a, a.outputs // width)
        else:
            each(a, a.outputs // width)

    return Kernel(body, Arguments)
