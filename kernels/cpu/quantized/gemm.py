"""GEMM with quantised weights on CPUs: rows are quantised when they are multiplied, and products added as integers.

Codes of 8 or 4 bits take a half or a quarter of the memory of bfloat16, which limits the speed of a decode pass. With
many rows the instructions limit it: one adds the products of two int8 numbers (as int16, VPMADDWD) or of four (with
AVX512_VNNI or AVX_VNNI, VPDPBUSD) in each 32-bit lane, where a multiply-add of float32 has one.

Codes of 4 bits with subgroups are expanded to 8 bits in registers, or for units of many rows once, into scratch memory.
Where sums are int16, they are multiplied instead, and offsets by the sums of the rows' numbers.

Weights are packed in panels of P columns, as in :mod:`..gemm`: ``[N / P, K / S, P, S]``, S inputs side by side that one
step multiplies (:class:`.codes.Form`). Codes of 4 bits: of both halves of the P · S codes of a step, the first has the
low bits of the bytes and the second the high ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from trunkline.kernels.cpu.elements import address
from trunkline.kernels.cpu.launches.memory import scratch_memory
from trunkline.kernels.cpu.threads import Kernel, team_size
from trunkline.kernels.cpu.units import TILE, for_each_unit

from .codes import Form
from .panels import MANY_ROWS, quantized_panel
from .rows import quantize_rows, row_bytes
from .tiles import Codes

_MIN_PARALLEL = 1 << 21  # multiply-adds; below, waking the other threads costs more than it saves
BLOCK_BYTES = 256 << 10  # of quantised rows: a block stays in the L2 cache while it is multiplied by all panels


@dataclass(frozen=True, slots=True)
class PackedCodes:
    """A weight [N, K] as the kernel reads it, N filled up to whole panels.

    Its numbers are ``factors[n] * (scales[n, g] * (code - zero) - minima[n, g])`` for inputs of group g. There is
    either a zero or minima. With subgroups, which have a zero, ``code`` is ``multiplier * code of 4 bits + offset``.
    """

    form: Form
    bits: int
    group: int  # inputs of a group
    inputs: int  # K
    zero: int
    codes: torch.Tensor  # uint8 [panels, K / S, P · S · bits / 8]
    factors: torch.Tensor  # float32 [panels · P]
    scales: torch.Tensor  # float16 [panels, K / group, P]
    minima: torch.Tensor  # the same, or empty
    subgroups: torch.Tensor  # uint8 [panels, K / 32, 2, P]: multipliers and offsets; or empty
    order: torch.Tensor | None = None  # int32 [K]: the input of each column of the codes

    @property
    def width(self) -> int:
        """Output columns, padding included."""
        return len(self.factors)


class Arguments:
    """The kernel's arguments: addresses, sizes, strides in elements but for ``x_row``."""

    x: int  # quantised rows
    x_row: int  # bytes from row to row
    numbers: int  # bytes of a row's numbers
    codes: int
    scales: int
    minima: int
    factors: int
    subgroups: int
    scratch: int  # for each thread, a panel's codes with 8 bits
    addend: int
    addend_row: int  # elements from row to row; 0: one row for all (bias)
    out: int
    rows: int
    inputs: int
    outputs: int
    group: int  # inputs of a group
    groups: int
    block: int  # rows of x of a unit of work
    claimed: int  # units that threads have claimed so far


def product(x: torch.Tensor, packed: PackedCodes, addend: torch.Tensor, out: torch.Tensor) -> None:
    """``x`` [M, K] times the weight, plus ``addend`` [N] or [M, N] -> ``out`` [M, N], N the weight's ``width``.

    All tensors are contiguous and on the CPU. ``x`` is float32 or bfloat16; ``addend`` and ``out`` are both the one or
    both the other, and may be the same tensor. Two launches: ``x`` is quantised first. ValueError for anything else.
    """
    rows, inputs = x.shape
    outputs, groups = packed.width, packed.inputs // packed.group
    if inputs != packed.inputs or out.shape != (rows, outputs) or addend.shape[-1] != outputs:
        raise ValueError(f"x {tuple(x.shape)}, weights [{outputs}, {packed.inputs}], out {tuple(out.shape)} don't fit")
    if addend.ndim == 2 and addend.shape[0] != rows:
        raise ValueError(f"addend has {addend.shape[0]} rows, x has {rows}")
    size = packed.form.number_bytes
    shifted, subgroups = len(packed.minima) > 0, len(packed.subgroups) > 0
    codes = Codes(packed.form, packed.bits, shifted, out.dtype == torch.bfloat16, subgroups)
    row = row_bytes(inputs, groups, size, codes.summed)
    block = max(TILE, BLOCK_BYTES // row // TILE * TILE)
    # For each thread of a whole team, which replays recorded launches.
    wide = team_size() * inputs * packed.form.columns if codes.expanded and min(rows, block) >= MANY_ROWS else 0
    quantized, expanded = scratch_memory(rows * row), scratch_memory(wide, of_threads=True)
    quantize_rows(x, packed.group, None if shifted else packed.zero, size, quantized, packed.order, codes.summed)
    _kernel(codes).run(
        team_size(rows * inputs * outputs > _MIN_PARALLEL),
        x=quantized.data_ptr(),
        x_row=row,
        numbers=inputs * size,
        codes=packed.codes.data_ptr(),
        scales=packed.scales.data_ptr(),
        minima=packed.minima.data_ptr(),
        factors=address(packed.factors, "factors", torch.float32),
        subgroups=packed.subgroups.data_ptr(),
        scratch=expanded.data_ptr(),
        addend=address(addend, "addend", out.dtype),
        addend_row=outputs if addend.ndim == 2 else 0,
        out=address(out, "out"),
        rows=rows,
        inputs=inputs,
        outputs=outputs,
        group=packed.group,
        groups=groups,
        block=block,
        claimed=0,
    )


@cache
def _kernel(codes: Codes) -> Kernel:
    columns = codes.form.columns
    panel = quantized_panel(codes)

    def multiply(a: Any, p: int, first: int, last: int) -> None:
        panel(a, p, first, last)

    each = for_each_unit(columns, multiply)

    def body(a: Any) -> None:
        each(a, a.outputs // columns)

    return Kernel(body, Arguments)
