"""Quantises the rows of a product: int8 numbers, with a scale for each group of inputs."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from numba import njit

from trunkline.kernels.cpu.elements import access, address, bits_of_float, float_of_bits, team_for
from trunkline.kernels.cpu.threads import OPTIONS, Kernel, float32s, int8s, int16s, int32s, thread, threads
from trunkline.kernels.quantized.subgroups import SUBGROUP

LARGEST = 127  # of the numbers, so that they are symmetric about 0
LEAST = 1e-30  # smaller numbers are taken for zero: their reciprocal isn't finite
CACHE_LINE = 64  # bytes


def row_bytes(inputs: int, groups: int, number_bytes: int, sums: bool = False) -> int:
    """Bytes from one quantised row to the next: its numbers, 8 bytes for each group, and with ``sums`` 4 bytes for each
    subgroup."""
    used = inputs * number_bytes + 8 * groups + (4 * (inputs // SUBGROUP) if sums else 0)
    return -(-used // CACHE_LINE) * CACHE_LINE


def quantize_rows_reference(x: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``x`` [M, K] -> numbers int32 [M, K] from -127 to 127, and scales float32 [M, K / group].

    A scale is the largest absolute value of its group, divided by 127; 0 if that value is below 1e-30, and NaN if an
    input isn't finite.
    """
    parts = x.float().view(len(x), x.shape[1] // group, group)
    most, finite = parts.abs().amax(-1), parts.isfinite().all(-1)
    used = finite & (most >= LEAST)
    inverse = torch.full_like(most, LARGEST) / most  # not 127 / most: torch multiplies that by a rounded reciprocal
    numbers = torch.round(parts * torch.where(used, inverse, 0.0)[..., None])
    numbers = torch.where(used[..., None], numbers, 0.0).to(torch.int32)
    return numbers.view_as(x), torch.where(used, most / LARGEST, torch.where(finite, 0.0, torch.nan))


class Arguments:
    """The kernel's arguments. A quantised row has its numbers, then for each group a scale (float32) and a sum.

    Where int16 sums are multiplied by the integers of subgroups, the sum of each subgroup's numbers (int32) follows.
    """

    x: int
    rows: int
    inputs: int
    group: int  # inputs of a group
    zero: int  # the code that stands for zero; the sum is -zero times that of the numbers, as int32
    out: int
    out_row: int  # bytes from row to row
    numbers: int  # bytes of a row's numbers
    order: int  # the input of each number, if they are reordered


def quantize_rows(
    x: torch.Tensor,
    group: int,
    zero: int | None,
    number_bytes: int,
    out: torch.Tensor,
    order: torch.Tensor | None = None,
    sums: bool = False,
) -> None:
    """:func:`quantize_rows_reference`, compiled: ``x`` [M, K] float32 or bfloat16 -> ``out`` uint8 [>= M · row bytes].

    With ``order`` int32 [K] of ``x[:, order]``.

    After a group's scale follows -``zero`` times the sum of its numbers, as int32; without a zero, minus the sum of
    its numbers times its scale, as float32. ``number_bytes`` of a number: 1 or 2. ``sums``: those of subgroups, too.
    """
    rows, inputs = x.shape
    row = row_bytes(inputs, inputs // group, number_bytes, sums)
    if inputs % group or len(out) < rows * row:
        raise ValueError(f"x {tuple(x.shape)} doesn't fit into groups of {group} inputs and {len(out)} bytes")
    _kernel(x.dtype, number_bytes, zero is None, order is not None, sums).run(
        team_for(rows * inputs),
        x=address(x, "x"),
        rows=rows,
        inputs=inputs,
        group=group,
        zero=0 if zero is None else zero,
        out=address(out, "out", torch.uint8),
        out_row=row,
        numbers=inputs * number_bytes,
        order=0 if order is None else address(order, "order", torch.int32),
    )


@cache
def quantizer(dtype: torch.dtype, number_bytes: int, ordered: bool = False) -> Any:
    """Compiled ``quantize(x, order, count, out)`` of ``count`` numbers of ``dtype``: their scale, and the results' sum.

    ``x`` and ``out`` are addresses. If ``ordered``, the i-th number is at index ``order[i]`` (int32) of ``x``.
    """
    read, _, _ = access(dtype)
    stored = int8s if number_bytes == 1 else int16s
    kind = np.int8 if number_bytes == 1 else np.int16

    def place(order: int, i: int) -> Any:
        return np.int64(int32s(order)[i]) if ordered else i

    place = njit(**OPTIONS)(place)

    def quantize(x: int, order: int, count: int, out: int) -> tuple[Any, Any]:
        bits = np.int32(0)  # of the largest absolute value: positive numbers have the order of their bits
        for i in range(count):
            bits = max(bits, bits_of_float(read(x, place(order, i))) & np.int32(0x7FFFFFFF))
        most = float_of_bits(bits)
        inverse = np.float32(LARGEST) / most if np.float32(LEAST) <= most < np.inf else np.float32(0)
        total, numbers = np.int32(0), stored(out)
        if inverse == 0:
            for i in range(count):
                numbers[i] = kind(0)
            return (np.float32(0) if most < np.inf else np.float32(np.nan)), total
        for i in range(count):
            number = np.int32(np.rint(read(x, place(order, i)) * inverse))
            numbers[i] = kind(number)
            total += number
        return most / np.float32(LARGEST), total

    return njit(**OPTIONS)(quantize)


@cache
def _kernel(dtype: torch.dtype, number_bytes: int, shifted: bool, ordered: bool, summed: bool) -> Kernel:
    quantize, size = quantizer(dtype, number_bytes, ordered), dtype.itemsize

    def add_up(row: int, inputs: int, sums: Any) -> None:
        numbers = int8s(row)
        for s in range(inputs // SUBGROUP):
            total = np.int32(0)
            for i in range(SUBGROUP):
                total += numbers[s * SUBGROUP + i]
            sums[s] = total

    add_up = njit(**OPTIONS)(add_up)

    def body(a: Any) -> None:
        team, me = threads(), thread()
        for row in range(a.rows * me // team, a.rows * (me + 1) // team):
            x, out = a.x + row * a.inputs * size, a.out + row * a.out_row
            scales = float32s(out + a.numbers)
            sums = int32s(out + a.numbers)
            for g in range(a.inputs // a.group):
                first = g * a.group
                source, order = (x, a.order + first * 4) if ordered else (x + first * size, 0)
                scale, total = quantize(source, order, a.group, out + first * number_bytes)
                scales[2 * g] = scale
                if shifted:
                    scales[2 * g + 1] = -scale * np.float32(total)
                else:
                    sums[2 * g + 1] = -a.zero * total
            if summed:
                add_up(out, a.inputs, int32s(out + a.numbers + 8 * (a.inputs // a.group)))

    return Kernel(body, Arguments)
