"""The innermost part of :mod:`.gemm`: a few rows of one panel, with all their sums in registers.

Written as vectors for LLVM, because no loop vectoriser keeps a two-dimensional block of sums in
registers. A tile is an intrinsic ``tile(x, weight, addend, out, inputs, x_row, addend_row, out_row)``
over addresses and row lengths in bytes: ``out[r] = addend[r] + sum over k of x[r, k] * weight[k]``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from numba import njit, types
from numba.extending import intrinsic

from .bfloat16_pairs import PAIR_BYTES, PAIR_LANES, dot, load_pairs, no_sums, spread_pair, store_pairs, store_rounded
from .threads import OPTIONS
from .vectors import INT, LANES, Vectors, all_lanes, generator

CACHE_LINE = 64  # bytes
FLOAT_PANEL = 2 * LANES  # columns; 6 rows of a panel fill 12 of AVX's 16 registers with sums
PAIR_PANEL = 2 * PAIR_LANES  # 12 rows of a panel fill 24 of AVX-512's 32 registers


class Numbers(NamedTuple):
    """How a tile reads, multiplies and writes numbers of some dtypes; a panel has two vectors of columns.

    One step of a tile multiplies one input of each row, or a pair of neighbours, with the weights of all columns.
    A tuple of functions, so that compiled panels can be kept on disk (:func:`.objects.fingerprint`).
    """

    x: int  # bytes of one number of ``x`` and of ``addend``
    out: int  # bytes of one result
    line: int  # bytes of the weights that one step reads
    pairs: int  # 1 if a step takes two inputs, else 0
    zeros: Callable[[int], list[Any]]  # (number of vectors)
    weights: Callable[[Vectors, Any], Any]  # (vectors, address)
    factor: Callable[[Vectors, Any], Any]  # (vectors, address): one row's input or pair, in all lanes
    multiply: Callable[[Vectors, Any, Any, Any], Any]  # (vectors, sum, factor, weights)
    addend: Callable[[Vectors, Any], Any]  # (vectors, address)
    store: Callable[[Vectors, Any, Any], None]  # (vectors, results, address)


def float_panel(half: bool) -> Any:
    """Compiled ``panel(a, weight, first, last, column)``: float32 rows ``[first, last)`` of one panel.

    ``weight`` is the panel's address, ``column`` its first output; weights are bfloat16 if ``half``.
    """
    numbers = Numbers(
        x=4,
        out=4,
        line=FLOAT_PANEL * (2 if half else 4),
        pairs=0,
        zeros=lambda count: [all_lanes(0.0)] * count,
        weights=lambda v, where: v.load(where, half),
        factor=Vectors.spread_from,
        multiply=lambda v, total, factor, weights: v.fma(factor, weights, total),
        addend=Vectors.load,
        store=Vectors.store,
    )
    return _panel(numbers, 6, 4)


def pair_panel(wide: bool) -> Any:
    """As :func:`float_panel`, in bfloat16 with sums in float32: AVX512_BF16 multiplies and adds pairs.

    Results are bfloat16, or float32 if ``wide``.
    """
    numbers = Numbers(
        x=2,
        out=4 if wide else 2,
        line=2 * PAIR_BYTES,
        pairs=1,
        zeros=no_sums,
        weights=load_pairs,
        factor=spread_pair,
        multiply=dot,
        addend=lambda v, where: v.load(where, True, PAIR_LANES),
        store=store_pairs if wide else store_rounded,
    )
    return _panel(numbers, 12, 8)


def _panel(numbers: Numbers, most: int, fewer: int) -> Any:
    """The compiled panel: its rows are divided into tiles of ``most``, ``fewer``, 4, 2 and 1 rows.

    Eight rows are two tiles where ``most`` is 6, so that no lone row is left where that can be helped.
    """
    tile_most, tile_fewer, tile4, tile2, tile1 = (_tile(rows, numbers) for rows in (most, fewer, 4, 2, 1))
    x_size, out_size = numbers.x, numbers.out

    def panel(a: Any, weight: int, first: int, last: int, column: int) -> None:
        x_row, out_row, addend_row = a.inputs * x_size, a.outputs * out_size, a.addend_row * x_size
        m = first
        while m < last:
            x, out = a.x + m * x_row, a.out + m * out_row + column * out_size
            addend, left = a.addend + m * addend_row + column * x_size, last - m
            if left >= most and left != 8:
                tile_most(x, weight, addend, out, a.inputs, x_row, addend_row, out_row)
                m += most
            elif left >= fewer:
                tile_fewer(x, weight, addend, out, a.inputs, x_row, addend_row, out_row)
                m += fewer
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


def _tile(rows: int, numbers: Numbers) -> Any:
    half_line = numbers.line // 2  # bytes of one vector of weights
    columns = PAIR_LANES if numbers.pairs else LANES  # of one vector
    x_size, out_size = columns * numbers.x, columns * numbers.out

    def emit(v: Vectors, x: Any, weight: Any, addend: Any, out: Any, inputs: Any, xr: Any, sr: Any, outr: Any) -> None:
        starts = [v.at(x, xr, r) for r in range(rows)]
        steps = v.builder.lshr(inputs, INT(numbers.pairs))
        panel = v.builder.mul(steps, INT(numbers.line))

        def step(k: Any, sums: list[Any]) -> list[Any]:
            where, result = v.at(weight, numbers.line, k), []
            places = [v.at(where, half_line, i) for i in range(2)]
            weights = [numbers.weights(v, place) for place in places]
            # The next panel will be in the cache when its turn comes: the CPU doesn't see that it follows.
            for place in places[: -(-numbers.line // CACHE_LINE)]:
                v.prefetch(v.builder.add(place, panel))
            for r, start in enumerate(starts):
                factor = numbers.factor(v, v.at(start, 4, k))
                result += [numbers.multiply(v, sums[2 * r + i], factor, one) for i, one in enumerate(weights)]
            return result

        for n, total in enumerate(v.loop(steps, numbers.zeros(2 * rows), step)):
            r, i = divmod(n, 2)
            # Added last: a large residual as the first summand would round off the small ones.
            first = numbers.addend(v, v.at(v.at(addend, sr, r), x_size, i))
            numbers.store(v, v.builder.fadd(total, first), v.at(v.at(out, outr, r), out_size, i))

    def typed(typing: Any, x: Any, weight: Any, addend: Any, out: Any, inputs: Any, xr: Any, sr: Any, outr: Any) -> Any:
        return types.void(*[types.int64] * 8), generator(emit)

    return intrinsic(typed)
