"""The inner loops of :mod:`.ordered_pairs`, as SIMD code: pairs of bfloat16 numbers, float32 sums."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from trunkline.kernels.cpu.bfloat16_pairs import (
    PAIR_BYTES,
    PAIR_LANES,
    dot,
    exp2,
    fma,
    join_pairs,
    load_broadcast_pair,
    load_halves,
    load_pairs,
    load_sums,
    no_sums,
    store_pairs,
    store_rounded,
)
from trunkline.kernels.cpu.vectors import INT, Vectors, generator

from .ordered_blocks import TILE, TILE_BYTES

STATE_BYTES = 3 * PAIR_BYTES  # of a head: three vectors, see _weigh
_VECTORS = 4  # of dimensions of values that are computed together


def scores(heads: int) -> Any:
    """``scores(queries, query_row, tile, width, s, s_row, factor)``: of ``heads`` query vectors and TILE keys.

    ``s[h, j] = factor * sum over d < width of queries[h, d] * tile[d, j]``, for pairs, in the order of ``d``.
    """

    def emit(v: Vectors, queries: Any, query_row: Any, tile: Any, width: Any, s: Any, s_row: Any, factor: Any) -> None:
        starts = [v.at(queries, query_row, h) for h in range(heads)]
        vectors = TILE // PAIR_LANES

        def step(d: Any, sums: list[Any]) -> list[Any]:
            row = v.at(tile, TILE_BYTES, d)
            keys = [load_pairs(v, v.at(row, PAIR_BYTES, i)) for i in range(vectors)]
            queries = [load_broadcast_pair(v, v.at(start, 4, d)) for start in starts]
            return [
                dot(v, sums[vectors * h + i], key, query)
                for h, query in enumerate(queries)
                for i, key in enumerate(keys)
            ]

        for index, total in enumerate(v.loop(width, no_sums(vectors * heads), step)):
            h, i = divmod(index, vectors)
            scaled = v.builder.fmul(total, v.broadcast(factor, PAIR_LANES))
            store_pairs(v, scaled, v.at(v.at(s, s_row, h), PAIR_BYTES, i))

    def typed(typing: Any, queries: Any, query_row: Any, tile: Any, width: Any, s: Any, s_row: Any, factor: Any) -> Any:
        return types.void(*[types.int64] * 6, types.float32), generator(emit)

    return intrinsic(typed)


def _weigh(typing: Any, s: Any, vectors: Any, state: Any, rounded: Any) -> Any:
    """``weigh(s, vectors, state, rounded)``: one step of the online softmax, ``s[:] = 2 ** (s - largest)``.

    The weights are written to ``rounded`` as bfloat16, too. ``state`` is as in :func:`.ordered_blocks._weigh`.
    """

    def emit(v: Vectors, s: Any, vectors: Any, state: Any, rounded: Any) -> None:
        builder, old = v.builder, load_sums(v, state)
        (top,) = v.loop(vectors, [old], lambda i, found: [v.maximum(load_sums(v, v.at(s, PAIR_BYTES, i)), found[0])])
        for apart in (8, 4, 2, 1):
            order = ir.VectorType(ir.IntType(32), PAIR_LANES)([lane ^ apart for lane in range(PAIR_LANES)])
            top = v.maximum(top, builder.shuffle_vector(top, top, order))

        def step(i: Any, _: list[Any]) -> list[Any]:
            place = v.at(s, PAIR_BYTES, i)
            weights = exp2(v, builder.fsub(load_sums(v, place), top))
            store_pairs(v, weights, place)
            store_rounded(v, weights, v.at(rounded, PAIR_BYTES // 2, i))
            return []

        v.loop(vectors, [], step)
        store_pairs(v, top, state)
        store_pairs(v, exp2(v, builder.fsub(old, top)), v.at(state, PAIR_BYTES, 2))

    return types.void(*[types.int64] * 4), generator(emit)


def accumulate(heads: int, value_dim: int) -> Any:
    """``accumulate(states, state_row, where, n, s, s_row, rounded)``: add ``n`` pairs of values, in the order of keys.

    For each of ``heads`` heads, ``total = total * factor + sum over j < n of weight pair j * value pair j``, and the
    sum of the weights in the same way: of those at even positions, then of the others. A head's total, then its state
    lie at ``states``; ``where`` has the address of each value.
    """
    count, state = value_dim // PAIR_LANES, 4 * value_dim

    def emit(v: Vectors, states: Any, state_row: Any, where: Any, n: Any, s: Any, s_row: Any, rounded: Any) -> None:
        builder, rows = v.builder, [v.at(states, state_row, h) for h in range(heads)]
        half_row = builder.lshr(s_row, INT(1))
        factors = [load_sums(v, v.at(v.at(row, 1, state), PAIR_BYTES, 2)) for row in rows]
        for first in range(0, count, _VECTORS):
            vectors = range(first, min(first + _VECTORS, count))

            def step(j: Any, sums: list[Any], vectors: range = vectors, weighs: bool = first == 0) -> list[Any]:
                both = [v.load_int(v.at(v.at(where, 16, j), 8, odd)) for odd in range(2)]
                pairs = [
                    join_pairs(v, *(load_halves(v, v.at(value, 2 * PAIR_LANES, i)) for value in both)) for i in vectors
                ]
                result = []
                for h in range(heads):
                    weights = load_broadcast_pair(v, v.at(v.at(rounded, half_row, h), 4, j))
                    mine = sums[h * len(pairs) : (h + 1) * len(pairs)]
                    result += [dot(v, total, pair, weights) for total, pair in zip(mine, pairs, strict=True)]
                if weighs:  # the first two lanes
                    result += [
                        builder.fadd(total, load_sums(v, v.at(v.at(s, s_row, h), 8, j)))
                        for h, total in enumerate(sums[heads * len(pairs) :])
                    ]
                return result

            sums = v.loop(n, no_sums(heads * len(vectors) + (heads if first == 0 else 0)), step)
            for h, row in enumerate(rows):
                for i, vector in enumerate(vectors):
                    place = v.at(row, PAIR_BYTES, vector)
                    store_pairs(v, fma(v, load_sums(v, place), factors[h], sums[h * len(vectors) + i]), place)
                if first == 0:
                    total = sums[heads * len(vectors) + h]
                    lanes = [builder.extract_element(total, ir.IntType(32)(lane)) for lane in range(2)]
                    added = v.broadcast(builder.fadd(*lanes), PAIR_LANES)
                    place = v.at(v.at(row, 1, state), PAIR_BYTES, 1)
                    store_pairs(v, fma(v, load_sums(v, place), factors[h], added), place)

    def typed(typing: Any, states: Any, state_row: Any, where: Any, n: Any, s: Any, s_row: Any, rounded: Any) -> Any:
        return types.void(*[types.int64] * 7), generator(emit)

    return intrinsic(typed)


def _store_scaled(typing: Any, sums: Any, vectors: Any, factor: Any, out: Any) -> Any:
    """``store_scaled(sums, vectors, factor, out)``: write ``sums * factor`` as bfloat16."""

    def emit(v: Vectors, sums: Any, vectors: Any, factor: Any, out: Any) -> None:
        factors = v.broadcast(factor, PAIR_LANES)

        def step(i: Any, _: list[Any]) -> list[Any]:
            scaled = v.builder.fmul(load_sums(v, v.at(sums, PAIR_BYTES, i)), factors)
            store_rounded(v, scaled, v.at(out, PAIR_BYTES // 2, i))
            return []

        v.loop(vectors, [], step)

    return types.void(types.int64, types.int64, types.float32, types.int64), generator(emit)


weigh, store_scaled = intrinsic(_weigh), intrinsic(_store_scaled)
