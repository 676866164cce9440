"""The rows of a unit of :mod:`.gemm` times one panel of columns, tile by tile."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import intrinsic

from trunkline.kernels.cpu.threads import OPTIONS, thread
from trunkline.kernels.cpu.vectors import Vectors, generator
from trunkline.kernels.quantized.subgroups import SUBGROUP

from .codes import WIDE_LANES, Step
from .tiles import Codes, tile

MANY_ROWS = 60  # of a unit; from here on, writing expanded codes costs less than expanding them for each tile


def quantized_panel(codes: Codes) -> Any:
    """Compiled ``panel(a, p, first, last)``: all inputs of the rows ``[first, last)`` times panel ``p``.

    ``a``: :class:`.gemm.Arguments`. For many rows, codes that are to be expanded are expanded once, not for each tile.
    """
    few, code_bytes, columns = _rows(codes), codes.step_bytes // codes.form.inputs, codes.form.columns
    many, expand = _rows(codes._replace(bits=8, subgroups=False)), _expand(codes)

    def panel(a: Any, p: int, first: int, last: int) -> None:
        panel_bytes = a.inputs * code_bytes
        weight = a.codes + p * panel_bytes
        if last - first < MANY_ROWS:
            few(a, p, first, last, weight, panel_bytes)
        else:
            wide = a.scratch + np.int64(thread()) * a.inputs * columns
            expand(weight, a.subgroups + p * (a.inputs // SUBGROUP) * columns * 2, wide, a.inputs // SUBGROUP)
            many(a, p, first, last, wide, np.int64(0))

    def panel_as_it_is(a: Any, p: int, first: int, last: int) -> None:
        panel_bytes = a.inputs * code_bytes
        few(a, p, first, last, a.codes + p * panel_bytes, panel_bytes)

    return njit(**OPTIONS)(panel if codes.expanded else panel_as_it_is)


def _expand(codes: Codes) -> Any:
    """``expand(weight, subgroups, out, count)``: write a panel's codes of 8 bits, for ``count`` subgroups."""
    steps, step_bytes = SUBGROUP // codes.form.inputs, codes.step_bytes

    def emit(v: Vectors, weight: Any, subgroups: Any, out: Any, count: Any) -> None:
        step = Step(v, codes.form, codes.bits)

        def subgroup(s: Any, _: list[Any]) -> list[Any]:
            integers = step.load_subgroup(v.at(subgroups, 2 * codes.form.columns, s))
            first, target = v.at(weight, steps * step_bytes, s), v.at(out, 2 * steps * step_bytes, s)
            for k in range(steps):
                step.store_expanded(v.at(first, step_bytes, k), integers, v.at(target, 2 * step_bytes, k))
            return []

        v.loop(count, [], subgroup)

    def typed(typing: Any, weight: Any, subgroups: Any, out: Any, count: Any) -> Any:
        return types.void(*[types.int64] * 4), generator(emit)

    return intrinsic(typed)


def _rows(codes: Codes) -> Any:
    """Compiled ``rows(a, p, first, last, weight, next_panel)``: as :func:`quantized_panel`, with the panel's codes at
    ``weight``, and those of the next one ``next_panel`` bytes further.

    Rows are divided into tiles as in :mod:`..gemm_tiles`.
    """
    most, fewer = (12, 8) if codes.form.lanes == WIDE_LANES else (6, 4)  # AVX-512 has twice as many registers
    tile_most, tile_fewer, tile4, tile2, tile1 = (tile(rows, codes) for rows in (most, fewer, 4, 2, 1))
    columns, inputs, size = codes.form.columns, codes.form.inputs, codes.out_bytes

    def rows(a: Any, p: int, first: int, last: int, weight: int, next_panel: int) -> None:
        factors = a.factors + p * columns * 4
        scales, minima = a.scales + p * a.groups * columns * 2, a.minima + p * a.groups * columns * 2
        out_row, addend_row = a.outputs * size, a.addend_row * size
        subgroups = a.subgroups + p * (a.inputs // SUBGROUP) * columns * 2
        addresses, strides = (weight, scales, minima, factors, subgroups), (a.x_row, a.numbers, addend_row, out_row)
        fixed = addresses + strides + (a.groups, a.group // inputs, next_panel)
        m = first
        while m < last:
            x = a.x + m * a.x_row
            addend = a.addend + m * addend_row + p * columns * size
            out = a.out + m * out_row + p * columns * size
            left = last - m
            if left >= most and left != 8:  # 8 rows are 4 + 4
                tile_most((x, addend, out, *fixed))
                m += most
            elif left >= fewer:
                tile_fewer((x, addend, out, *fixed))
                m += fewer
            elif left >= 4:
                tile4((x, addend, out, *fixed))
                m += 4
            elif left >= 2:
                tile2((x, addend, out, *fixed))
                m += 2
            else:
                tile1((x, addend, out, *fixed))
                m += 1

    return njit(**OPTIONS)(rows)
