"""The inner loops of :mod:`.paged`, as SIMD code: one query vector over a block of keys and values.

Keys and values are given by their addresses, int64 each; the list is padded with valid addresses to a
multiple of LANES. Their numbers are float32, and their widths multiples of LANES.
"""

from __future__ import annotations

from typing import Any

from numba import types
from numba.extending import intrinsic

from trunkline.kernels.cpu.vectors import BYTES, INT, LANES, Vectors, all_lanes, generator

_SLICE = 8  # vectors of the output that are accumulated in registers at a time


def scores(width: int) -> Any:
    """``scores(query, where, vectors, s)``: ``s[j] = query · key j`` for ``vectors * LANES`` keys."""

    def typed(typing: Any, query: Any, where: Any, vectors: Any, s: Any) -> Any:
        def emit(v: Vectors, query: Any, where: Any, vectors: Any, s: Any) -> None:
            def group(g: Any, _: list[Any]) -> list[Any]:
                first = v.at(where, 8 * LANES, g)
                keys = [v.load_int(v.at(first, 8, j)) for j in range(LANES)]

                def step(i: Any, sums: list[Any]) -> list[Any]:
                    offset = v.builder.mul(i, INT(BYTES))
                    query_part = v.load(v.builder.add(query, offset))
                    loaded = [v.load(v.builder.add(key, offset)) for key in keys]
                    return [v.fma(query_part, x, total) for x, total in zip(loaded, sums, strict=True)]

                sums = v.loop(INT(width // LANES), [all_lanes(0.0)] * LANES, step)
                v.store(v.sum_each(sums), v.at(s, BYTES, g))
                return []

            v.loop(vectors, [], group)

        return types.void(*[types.int64] * 4), generator(emit)

    return intrinsic(typed)


def _softmax(typing: Any, s: Any, vectors: Any, state: Any) -> Any:
    """``softmax(s, vectors, state)``: online softmax, ``s[:] = 2 ** (s - largest)`` for ``vectors * LANES`` scores.

    ``state`` is three vectors: the largest score so far, in all lanes; the sum of weights so far, a partial
    sum in each lane; and as a result the factor that rescales earlier weights to the new largest score.
    """

    def emit(v: Vectors, s: Any, vectors: Any, state: Any) -> None:
        builder, old = v.builder, v.load(state)
        (top,) = v.loop(vectors, [old], lambda g, found: [v.maximum(v.load(v.at(s, BYTES, g)), found[0])])
        top = v.max_across_lanes(top)

        def step(g: Any, totals: list[Any]) -> list[Any]:
            place = v.at(s, BYTES, g)
            weight = v.exp2(builder.fsub(v.load(place), top))
            v.store(weight, place)
            return [builder.fadd(totals[0], weight)]

        (total,) = v.loop(vectors, [all_lanes(0.0)], step)
        factor = v.exp2(builder.fsub(old, top))
        v.store(top, state)
        before = v.at(state, BYTES, 1)
        v.store(v.fma(v.load(before), factor, total), before)
        v.store(factor, v.at(state, BYTES, 2))

    return types.void(*[types.int64] * 3), generator(emit)


softmax = intrinsic(_softmax)


def accumulate(width: int) -> Any:
    """``accumulate(total, where, n, s, factor)``: ``total = total * factor + sum over j < n of s[j] * value j``.

    ``factor`` is the address of a vector with the factor in all lanes; ``n`` is at least 1.
    """

    def typed(typing: Any, total: Any, where: Any, n: Any, s: Any, factor: Any) -> Any:
        def emit(v: Vectors, total: Any, where: Any, n: Any, s: Any, factor: Any) -> None:
            factors = v.load(factor)
            for first in range(0, width // LANES, _SLICE):
                vectors = range(first, min(first + _SLICE, width // LANES))

                def step(j: Any, sums: list[Any], vectors: range = vectors) -> list[Any]:
                    value = v.load_int(v.at(where, 8, j))
                    weight = v.load_broadcast(v.at(s, 4, j))
                    return [
                        v.fma(weight, v.load(v.at(value, BYTES, i)), old) for i, old in zip(vectors, sums, strict=True)
                    ]

                sums = v.loop(n, [all_lanes(0.0)] * len(vectors), step)
                for i, new in zip(vectors, sums, strict=True):
                    place = v.at(total, BYTES, i)
                    v.store(v.fma(v.load(place), factors, new), place)

        return types.void(*[types.int64] * 5), generator(emit)

    return intrinsic(typed)


def _prefetch(typing: Any, where: Any, size: Any) -> Any:
    """``prefetch(where, size)``: prefetch ``size`` bytes into the L2 cache."""

    def emit(v: Vectors, where: Any, size: Any) -> None:
        def line(i: Any, _: list[Any]) -> list[Any]:
            v.prefetch(v.at(where, 64, i))
            return []

        v.loop(v.builder.lshr(v.builder.add(size, INT(63)), INT(6)), [], line)

    return types.void(types.int64, types.int64), generator(emit)


prefetch = intrinsic(_prefetch)
