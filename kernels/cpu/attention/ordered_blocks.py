"""The inner loops of :mod:`.ordered`, as SIMD code: some query vectors of one row over a block of keys and values.

Keys and values are given by their addresses, int64 each. Their widths are multiples of LANES.
"""

from __future__ import annotations

from typing import Any

from numba import types
from numba.extending import intrinsic

from trunkline.kernels.cpu.vectors import BYTES, INT, LANES, Vectors, all_lanes, generator

TILE = 4 * LANES  # keys whose scores are accumulated in registers at a time
TILE_BYTES = 4 * TILE  # of one dimension of a transposed tile
_SLICE = 6  # vectors of the sums over values that are accumulated in registers at a time


def transpose_keys(width: int, bf16: bool) -> Any:
    """``transpose_keys(where, groups, tile)``: write ``groups * LANES`` keys to ``tile`` [width, TILE] as float32."""

    def typed(typing: Any, where: Any, groups: Any, tile: Any) -> Any:
        def emit(v: Vectors, where: Any, groups: Any, tile: Any) -> None:
            def group(g: Any, _: list[Any]) -> list[Any]:
                first = v.at(where, 8 * LANES, g)
                keys = [v.load_int(v.at(first, 8, j)) for j in range(LANES)]
                column = v.at(tile, BYTES, g)

                def step(i: Any, _: list[Any]) -> list[Any]:
                    rows = [v.load(v.at(key, BYTES // 2 if bf16 else BYTES, i), bf16) for key in keys]
                    target = v.at(column, LANES * TILE_BYTES, i)
                    for d, row in enumerate(v.transposed(rows)):
                        v.store(row, v.at(target, TILE_BYTES, d))
                    return []

                v.loop(INT(width // LANES), [], step)
                return []

            v.loop(groups, [], group)

        return types.void(*[types.int64] * 3), generator(emit)

    return intrinsic(typed)


def scores(heads: int) -> Any:
    """``scores(queries, query_row, tile, width, s, s_row)``: the scores of ``heads`` query vectors and TILE keys.

    ``s[h, j] = sum over d < width of queries[h, d] * tile[d, j]``, added in the order of ``d``.
    """

    def typed(typing: Any, queries: Any, query_row: Any, tile: Any, width: Any, s: Any, s_row: Any) -> Any:
        def emit(v: Vectors, queries: Any, query_row: Any, tile: Any, width: Any, s: Any, s_row: Any) -> None:
            starts = [v.at(queries, query_row, h) for h in range(heads)]
            vectors = TILE // LANES

            def step(d: Any, sums: list[Any]) -> list[Any]:
                row = v.at(tile, TILE_BYTES, d)
                keys = [v.load(v.at(row, BYTES, i)) for i in range(vectors)]
                result = []
                for h, start in enumerate(starts):
                    number = v.load_broadcast(v.at(start, 4, d))
                    result += [v.fma(number, key, sums[vectors * h + i]) for i, key in enumerate(keys)]
                return result

            for index, total in enumerate(v.loop(width, [all_lanes(0.0)] * (vectors * heads), step)):
                h, i = divmod(index, vectors)
                v.store(total, v.at(v.at(s, s_row, h), BYTES, i))

        return types.void(*[types.int64] * 6), generator(emit)

    return intrinsic(typed)


def _weigh(typing: Any, s: Any, vectors: Any, state: Any) -> Any:
    """``weigh(s, vectors, state)``: one step of the online softmax, ``s[:] = 2 ** (s - largest)``.

    For ``vectors * LANES`` scores. ``state`` is three vectors with one number in all lanes each: the largest score so
    far, which is updated; the sum of weights so far, which :func:`accumulate` updates; and as a result the factor that
    rescales earlier weights to the new largest score.
    """

    def emit(v: Vectors, s: Any, vectors: Any, state: Any) -> None:
        old = v.load(state)
        (top,) = v.loop(vectors, [old], lambda g, found: [v.maximum(v.load(v.at(s, BYTES, g)), found[0])])
        top = v.max_across_lanes(top)

        def step(g: Any, _: list[Any]) -> list[Any]:
            place = v.at(s, BYTES, g)
            v.store(v.exp2(v.builder.fsub(v.load(place), top)), place)
            return []

        v.loop(vectors, [], step)
        v.store(top, state)
        v.store(v.exp2(v.builder.fsub(old, top)), v.at(state, BYTES, 2))

    return types.void(*[types.int64] * 3), generator(emit)


weigh = intrinsic(_weigh)


def accumulate(width: int, bf16: bool) -> Any:
    """``accumulate(total, where, n, s, state)``: add ``n`` weighted values, and their weights, in the order of keys.

    ``total = total * factor + sum over j < n of s[j] * value j``; the same for the sum of weights in ``state``, see
    :func:`_weigh`.
    """

    def typed(typing: Any, total: Any, where: Any, n: Any, s: Any, state: Any) -> Any:
        def emit(v: Vectors, total: Any, where: Any, n: Any, s: Any, state: Any) -> None:
            factor = v.load(v.at(state, BYTES, 2))

            def rescale_and_add(place: Any, new: Any) -> None:
                v.store(v.fma(v.load(place), factor, new), place)

            for first in range(0, width // LANES, _SLICE):
                vectors = range(first, min(first + _SLICE, width // LANES))
                weighs = first == 0

                def step(j: Any, sums: list[Any], vectors: range = vectors, weighs: bool = weighs) -> list[Any]:
                    value, weight = v.load_int(v.at(where, 8, j)), v.load_broadcast(v.at(s, 4, j))
                    rows = [v.load(v.at(value, BYTES // 2 if bf16 else BYTES, i), bf16) for i in vectors]
                    result = [v.fma(row, weight, old) for row, old in zip(rows, sums, strict=False)]
                    return [*result, v.builder.fadd(sums[-1], weight)] if weighs else result

                sums = v.loop(n, [all_lanes(0.0)] * (len(vectors) + weighs), step)
                for i, new in zip(vectors, sums, strict=False):
                    rescale_and_add(v.at(total, BYTES, i), new)
                if weighs:
                    rescale_and_add(v.at(state, BYTES, 1), sums[-1])

        return types.void(*[types.int64] * 5), generator(emit)

    return intrinsic(typed)
