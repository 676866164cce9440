"""The microkernels of :mod:`.gemm`: tiles of a few rows of one panel, with all accumulators in registers.

They are LLVM IR, because LLVM's vectoriser doesn't keep a two-dimensional block of accumulators in
registers. A tile is an intrinsic ``tile(x, weight, addend, out, inputs, x_row, addend_row, out_row)``
over addresses and row lengths in bytes. It computes ``out[r] = addend[r] + sum over k of x[r, k] *
weight[k]`` for its rows r and all columns of the panel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from numba import njit, types
from numba.extending import intrinsic

from .bfloat16_pairs import (
    PAIR_BYTES,
    PAIR_LANES,
    dot,
    load_broadcast_pair,
    load_pairs,
    no_sums,
    store_pairs,
    store_rounded,
)
from .threads import OPTIONS
from .vectors import INT, LANES, Vectors, all_lanes, generator

CACHE_LINE = 64  # bytes
FLOAT_PANEL = 2 * LANES  # columns; 6 rows take 12 of AVX's 16 registers as accumulators
PAIR_PANEL = 2 * PAIR_LANES  # columns; 12 rows take 24 of AVX-512's 32 registers


class Numbers(NamedTuple):
    """How a tile loads, multiplies and stores the numbers of some dtypes. A panel is two vectors wide.

    One step of a tile multiplies one input of each row, or a pair of neighbouring inputs, by the weights of
    all columns. A tuple of functions, because :func:`.objects.fingerprint` must be able to identify it.
    """

    x: int  # bytes of one number of ``x`` and of ``addend``
    out: int  # bytes of one result
    step_bytes: int  # bytes of the weights that one step reads
    pairs: int  # 1 if a step takes two inputs, else 0
    zeros: Callable[[int], list[Any]]  # (number of vectors)
    weights: Callable[[Vectors, Any], Any]  # (vectors, address)
    factor: Callable[[Vectors, Any], Any]  # (vectors, address): one row's input or pair, in all lanes
    multiply: Callable[[Vectors, Any, Any, Any], Any]  # (vectors, sum, factor, weights)
    addend: Callable[[Vectors, Any], Any]  # (vectors, address)
    store: Callable[[Vectors, Any, Any], None]  # (vectors, results, address)


def float_panel(bf16: bool) -> Any:
    """Compiled ``panel(a, weight, first, last, column)``: rows ``[first, last)`` of x times one panel, in float32.

    ``a``: :class:`.gemm.Arguments`. ``weight`` is the panel's address and ``column`` its first output column.
    Weights are stored as bfloat16 if ``bf16``.
    """
    numbers = Numbers(
        x=4,
        out=4,
        step_bytes=FLOAT_PANEL * (2 if bf16 else 4),
        pairs=0,
        zeros=lambda count: [all_lanes(0.0)] * count,
        weights=lambda v, where: v.load(where, bf16),
        factor=Vectors.load_broadcast,
        multiply=lambda v, total, factor, weights: v.fma(factor, weights, total),
        addend=Vectors.load,
        store=Vectors.store,
    )
    return _panel(numbers, 6, 4)


def pair_panel(float32_out: bool) -> Any:
    """As :func:`float_panel`, for bfloat16 rows and weights, with float32 accumulators (AVX512_BF16).

    Results are bfloat16, or float32 if ``float32_out``.
    """
    numbers = Numbers(
        x=2,
        out=4 if float32_out else 2,
        step_bytes=2 * PAIR_BYTES,
        pairs=1,
        zeros=no_sums,
        weights=load_pairs,
        factor=load_broadcast_pair,
        multiply=dot,
        addend=lambda v, where: v.load(where, True, PAIR_LANES),
        store=store_pairs if float32_out else store_rounded,
    )
    return _panel(numbers, 12, 8)


def _panel(numbers: Numbers, max_rows: int, fewer_rows: int) -> Any:
    """The compiled panel: rows are divided into tiles of ``max_rows``, ``fewer_rows``, 4, 2 and 1 rows.

    8 rows are 4 + 4, not 6 + 2: small tiles use the registers less well.
    """
    tile_max, tile_fewer, tile4, tile2, tile1 = (_tile(rows, numbers) for rows in (max_rows, fewer_rows, 4, 2, 1))
    x_size, out_size = numbers.x, numbers.out

    def panel(a: Any, weight: int, first: int, last: int, column: int) -> None:
        x_row, out_row, addend_row = a.inputs * x_size, a.outputs * out_size, a.addend_row * x_size
        m = first
        while m < last:
            x, out = a.x + m * x_row, a.out + m * out_row + column * out_size
            addend, left = a.addend + m * addend_row + column * x_size, last - m
            if left >= max_rows and left != 8:
                tile_max(x, weight, addend, out, a.inputs, x_row, addend_row, out_row)
                m += max_rows
            elif left >= fewer_rows:
                tile_fewer(x, weight, addend, out, a.inputs, x_row, addend_row, out_row)
                m += fewer_rows
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
    vector_bytes = numbers.step_bytes // 2  # of weights
    columns = PAIR_LANES if numbers.pairs else LANES  # of one vector
    x_size, out_size = columns * numbers.x, columns * numbers.out

    def emit(v: Vectors, x: Any, weight: Any, addend: Any, out: Any, inputs: Any, xr: Any, sr: Any, outr: Any) -> None:
        starts = [v.at(x, xr, r) for r in range(rows)]
        steps = v.builder.lshr(inputs, INT(numbers.pairs))
        panel = v.builder.mul(steps, INT(numbers.step_bytes))

        def step(k: Any, sums: list[Any]) -> list[Any]:
            where, result = v.at(weight, numbers.step_bytes, k), []
            places = [v.at(where, vector_bytes, i) for i in range(2)]
            weights = [numbers.weights(v, place) for place in places]
            # The CPU's prefetcher doesn't know that the next panel follows; this brings it into the L2 cache.
            for place in places[: -(-numbers.step_bytes // CACHE_LINE)]:
                v.prefetch(v.builder.add(place, panel))
            for r, start in enumerate(starts):
                factor = numbers.factor(v, v.at(start, 4, k))
                result += [numbers.multiply(v, sums[2 * r + i], factor, one) for i, one in enumerate(weights)]
            return result

        for n, total in enumerate(v.loop(steps, numbers.zeros(2 * rows), step)):
            r, i = divmod(n, 2)
            # Added last: adding small products to a large residual would lose their low bits.
            first = numbers.addend(v, v.at(v.at(addend, sr, r), x_size, i))
            numbers.store(v, v.builder.fadd(total, first), v.at(v.at(out, outr, r), out_size, i))

    def typed(typing: Any, x: Any, weight: Any, addend: Any, out: Any, inputs: Any, xr: Any, sr: Any, outr: Any) -> Any:
        return types.void(*[types.int64] * 8), generator(emit)

    return intrinsic(typed)
