"""Matrix products with packed weights on CPUs: ``x Wᵀ + addend``.

Decoding reads every weight once for a handful of rows, so its speed is the memory's. A
checkpoint in bfloat16 that runs in float32 holds no more than 16 bits a weight: kept as such and
widened in registers, the same results come out of half the bytes. CPUs that multiply bfloat16
themselves (AVX512_BF16) get rows in bfloat16, too.

Weights lie in panels of output columns. For float32 rows, ``[N / P, K, P]``; for bfloat16 rows, with
the weights of two neighbouring inputs side by side, ``[N / P, K / 2, P, 2]``. Tiles compute a few
rows of one panel (:mod:`.gemm_tiles`).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from .elements import address
from .gemm_tiles import FLOAT_PANEL, PAIR_PANEL, float_panel, pair_panel
from .threads import Task, claim, team_size

_SERIAL = 1 << 20  # multiplications below which waking the other threads costs more than it saves
_CLAIM = 1 << 18  # multiplications that a thread claims at a time: as many as make the claim's cost vanish
BLOCK_BYTES = 256 << 10  # of x, so that it stays in the L2 cache while panels pass by


class Arguments:
    """What the loop gets: addresses, sizes, strides in elements."""

    x: int
    weight: int
    addend: int
    addend_row: int  # numbers from row to row, 0 for one row
    out: int
    rows: int
    inputs: int
    outputs: int
    block: int  # rows that a unit has
    claimed: int  # units, by all threads


def pack(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``weight`` [N, K] for rows in float32, as ``dtype``: [ceil(N / P), K, P], filled up with zeros."""
    outputs, inputs = weight.shape
    panels = -(-outputs // FLOAT_PANEL)
    packed = torch.zeros(panels, inputs, FLOAT_PANEL, dtype=dtype)
    whole = outputs // FLOAT_PANEL
    packed[:whole] = weight[: whole * FLOAT_PANEL].view(whole, FLOAT_PANEL, inputs).transpose(1, 2)
    if whole < panels:
        packed[whole, :, : outputs - whole * FLOAT_PANEL] = weight[whole * FLOAT_PANEL :].t()
    return packed


def pack_pairs(weight: torch.Tensor) -> torch.Tensor:
    """``weight`` [N, K], K even, for rows in bfloat16: [ceil(N / P), K / 2, P, 2], filled up with zeros."""
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
    """These rows of the weight [N, K] that was packed, as they were."""
    width = packed.shape[2]
    first = rows.start // width
    panels = packed[first : -(-rows.stop // width)]
    if packed.ndim == 4:
        panels = panels.transpose(2, 3).flatten(1, 2)
    return panels.transpose(1, 2).flatten(0, 1)[rows.start - first * width : rows.stop - first * width]


def width_of(packed: torch.Tensor) -> int:
    """Outputs of a packed matrix, filled up to whole panels."""
    return packed.shape[0] * packed.shape[2]


def inputs_of(packed: torch.Tensor) -> int:
    """Inputs of a packed matrix."""
    return packed.shape[1] * (packed.shape[3] if packed.ndim == 4 else 1)


def rows_dtype(packed: torch.Tensor) -> torch.dtype:
    """What rows and results must be for a packed matrix."""
    return torch.float32 if packed.ndim == 3 else torch.bfloat16


def product_reference(x: torch.Tensor, packed: torch.Tensor, addend: torch.Tensor) -> torch.Tensor:
    """``x`` [M, K] times packed weights plus ``addend`` ([N] or [M, N]), N a multiple of the panel's width."""
    exact = torch.promote_types(x.dtype, torch.float32)
    weight = packed.to(exact)
    if packed.ndim == 4:
        weight = weight.transpose(2, 3).flatten(1, 2)
    weight = weight.transpose(1, 2).reshape(-1, weight.shape[1])
    return (x.to(exact) @ weight.t() + addend.to(exact)).to(x.dtype)


def product(x: torch.Tensor, packed: torch.Tensor, addend: torch.Tensor, out: torch.Tensor) -> None:
    """:func:`product_reference` into ``out`` [M, N], compiled.

    All contiguous and of :func:`rows_dtype`, sums in float32, which ``out`` takes as they are if it
    is float32. ``out`` may be ``addend`` itself.
    """
    rows, inputs = x.shape
    outputs, kind = width_of(packed), rows_dtype(packed)
    if inputs != inputs_of(packed) or out.shape != (rows, outputs) or addend.shape[-1] != outputs:
        raise ValueError(f"x {tuple(x.shape)}, weights {tuple(packed.shape)} and out {tuple(out.shape)} don't fit")
    if addend.ndim == 2 and addend.shape[0] != rows:
        raise ValueError(f"addend has {addend.shape[0]} rows, x has {rows}")
    _task(kind, packed.dtype, out.dtype).run(
        team_size(packed.numel() * rows > _SERIAL),
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
def _task(kind: torch.dtype, stored: torch.dtype, result: torch.dtype) -> Task:
    """For rows of dtype ``kind``, weights stored as ``stored`` and results of dtype ``result``."""
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

    return Task(body, Arguments)
