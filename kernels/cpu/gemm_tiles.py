"""The innermost part of :mod:`.gemm`: a few rows of one panel, with all their sums in registers.

Written as vectors for LLVM, because no loop vectoriser keeps a two-dimensional block of sums in
registers. A tile is an intrinsic ``tile(x, weight, addend, out, inputs, x_row, addend_row, out_row)``
over addresses and row lengths in bytes: ``out[r] = addend[r] + sum over k of x[r, k] * weight[k]``.
"""

from __future__ import annotations

from typing import Any

from numba import njit, types
from numba.extending import intrinsic

from .bfloat16_pairs import PAIR_BYTES, PAIR_LANES, dot, load_pairs, no_sums, spread_pair, store_pairs, store_rounded
from .threads import OPTIONS
from .vectors import BYTES, INT, LANES, Vectors, all_lanes, generator

FLOAT_PANEL = 2 * LANES  # columns; 6 rows of a panel fill 12 of AVX's 16 registers with sums
PAIR_PANEL = 2 * PAIR_LANES  # 12 rows of a panel fill 24 of AVX-512's 32 registers


def float_panel(half: bool) -> Any:
    """Compiled ``panel(a, weight, first, last, column)``: float32 rows ``[first, last)`` of one panel.

    ``weight`` is the panel's address, ``column`` its first output; weights are bfloat16 if ``half``.
    """
    tile6, tile4, tile2, tile1 = (intrinsic(_float_tile(rows, half)) for rows in (6, 4, 2, 1))

    def panel(a: Any, weight: int, first: int, last: int, column: int) -> None:
        """Rows are split so that no lone one is left where that can be helped."""
        x_row, out_row, addend_row = a.inputs * 4, a.outputs * 4, a.addend_row * 4
        m = first
        while m < last:
            x, out = a.x + m * x_row, a.out + m * out_row + column * 4
            addend, left = a.addend + m * addend_row + column * 4, last - m
            if left >= 6 and left != 8:
                tile6(x, weight, addend, out, a.inputs, x_row, addend_row, out_row)
                m += 6
            elif left >= 4:
                tile4(x, weight, addend, out, a.inputs, x_row, addend_row, out_row)
                m += 4
            elif left >= 2:
                tile2(x, weight, addend, out, a.inputs, x_row, addend_row, out_row)
                m += 2
            else:
                tile1(x, weight, addend, out, a.inputs, x_row, addend_row, out_row)
                m += 1

    return njit(**OPTIONS)(panel)


def _float_tile(rows: int, half: bool) -> Any:
    line = FLOAT_PANEL * (2 if half else 4)  # bytes of one input's weights in a panel

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


def pair_panel(wide: bool) -> Any:
    """As :func:`float_panel`, in bfloat16 with sums in float32: AVX512_BF16 multiplies and adds pairs.

    Results are bfloat16, or float32 if ``wide``.
    """
    tile12, tile8, tile4, tile2, tile1 = (intrinsic(_pair_tile(rows, wide)) for rows in (12, 8, 4, 2, 1))
    size = 4 if wide else 2

    def panel(a: Any, weight: int, first: int, last: int, column: int) -> None:
        x_row, out_row, addend_row = a.inputs * 2, a.outputs * size, a.addend_row * 2
        m = first
        while m < last:
            x, out = a.x + m * x_row, a.out + m * out_row + column * size
            addend, left = a.addend + m * addend_row + column * 2, last - m
            if left >= 12:
                tile12(x, weight, addend, out, a.inputs, x_row, addend_row, out_row)
                m += 12
            elif left >= 8:
                tile8(x, weight, addend, out, a.inputs, x_row, addend_row, out_row)
                m += 8
            elif left >= 4:
                tile4(x, weight, addend, out, a.inputs, x_row, addend_row, out_row)
                m += 4
            elif left >= 2:
                tile2(x, weight, addend, out, a.inputs, x_row, addend_row, out_row)
                m += 2
            else:
                tile1(x, weight, addend, out, a.inputs, x_row, addend_row, out_row)
                m += 1

    return njit(**OPTIONS)(panel)


def _pair_tile(rows: int, wide: bool) -> Any:
    line = 2 * PAIR_BYTES  # of two inputs' weights in a panel
    half = 2 * PAIR_LANES  # bytes of a vector of bfloat16
    size, store = (PAIR_BYTES, store_pairs) if wide else (half, store_rounded)  # of results

    def typed(typing: Any, x: Any, weight: Any, addend: Any, out: Any, inputs: Any, xr: Any, sr: Any, outr: Any) -> Any:
        def emit(
            v: Vectors, x: Any, weight: Any, addend: Any, out: Any, inputs: Any, xr: Any, sr: Any, outr: Any
        ) -> None:
            starts = [v.at(x, xr, r) for r in range(rows)]
            panel = v.builder.mul(inputs, INT(line // 2))

            def step(k: Any, sums: list[Any]) -> list[Any]:
                where, result = v.at(weight, line, k), []
                places = [v.at(where, PAIR_BYTES, i) for i in range(2)]
                columns = [load_pairs(v, place) for place in places]
                for place in places:
                    v.prefetch(v.builder.add(place, panel))
                for r, start in enumerate(starts):
                    factor = spread_pair(v, v.at(start, 4, k))
                    result += [dot(v, sums[2 * r + i], factor, column) for i, column in enumerate(columns)]
                return result

            pairs = v.builder.lshr(inputs, INT(1))
            for n, total in enumerate(v.loop(pairs, no_sums(2 * rows), step)):
                r, i = divmod(n, 2)
                first = v.load(v.at(v.at(addend, sr, r), half, i), True, PAIR_LANES)
                store(v, v.builder.fadd(total, first), v.at(v.at(out, outr, r), size, i))

        return types.void(*[types.int64] * 8), generator(emit)

    return typed
