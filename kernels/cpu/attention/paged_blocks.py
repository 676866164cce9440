"""The inner steps of :mod:`.paged`, as vector code: one query of one head over a block of keys.

Keys and values are found by a list of addresses, int64, with valid ones up to the next multiple
of LANES. Vectors of numbers are float32 and whole numbers of LANES wide.
"""

from __future__ import annotations

from typing import Any

from numba import types
from numba.extending import intrinsic

from trunkline.kernels.cpu.vectors import BYTES, INT, LANES, Vectors, all_lanes, generator

_SLICE = 8  # vectors of sums over values that stay in registers


def scores(width: int) -> Any:
    """``scores(query, where, groups, s)``: ``s[j] = query · key j``, for ``groups`` times LANES keys."""

    def typed(typing: Any, query: Any, where: Any, groups: Any, s: Any) -> Any:
        def emit(v: Vectors, query: Any, where: Any, groups: Any, s: Any) -> None:
            def group(g: Any, _: list[Any]) -> list[Any]:
                first = v.at(where, 8 * LANES, g)
                keys = [v.load_int(v.at(first, 8, j)) for j in range(LANES)]

                def step(i: Any, sums: list[Any]) -> list[Any]:
                    offset = v.builder.mul(i, INT(BYTES))
                    part = v.load(v.builder.add(query, offset))
                    loaded = [v.load(v.builder.add(key, offset)) for key in keys]
                    return [v.fma(part, x, total) for x, total in zip(loaded, sums, strict=True)]

                sums = v.loop(INT(width // LANES), [all_lanes(0.0)] * LANES, step)
                v.store(v.sums_of(sums), v.at(s, BYTES, g))
                return []

            v.loop(groups, [], group)

        return types.void(*[types.int64] * 4), generator(emit)

    return intrinsic(typed)


def _weigh(typing: Any, s: Any, groups: Any, state: Any) -> Any:
    """``weigh(s, groups, state)``: ``s[:] = 2 ** (s - largest)`` for ``groups`` times LANES scores.

    ``state`` is a vector with the largest score so far in all lanes, the sum of weights so far,
    lane by lane, and (result) the factor that brings older weights to the new largest score.
    """

    def emit(v: Vectors, s: Any, groups: Any, state: Any) -> None:
        builder, old = v.builder, v.load(state)
        (top,) = v.loop(groups, [old], lambda g, found: [v.larger(v.load(v.at(s, BYTES, g)), found[0])])
        top = v.largest_in_all(top)

        def step(g: Any, totals: list[Any]) -> list[Any]:
            place = v.at(s, BYTES, g)
            weight = v.two_to_the(builder.fsub(v.load(place), top))
            v.store(weight, place)
            return [builder.fadd(totals[0], weight)]

        (total,) = v.loop(groups, [all_lanes(0.0)], step)
        factor = v.two_to_the(builder.fsub(old, top))
        v.store(top, state)
        before = v.at(state, BYTES, 1)
        v.store(v.fma(v.load(before), factor, total), before)
        v.store(factor, v.at(state, BYTES, 2))

    return types.void(*[types.int64] * 3), generator(emit)


weigh = intrinsic(_weigh)


def accumulate(width: int) -> Any:
    """``accumulate(total, where, n, s, factor)``: ``total = total * factor + sum of s[j] * value j``.

    ``factor`` is the address of a vector, ``n`` at least 1.
    """

    def typed(typing: Any, total: Any, where: Any, n: Any, s: Any, factor: Any) -> Any:
        def emit(v: Vectors, total: Any, where: Any, n: Any, s: Any, factor: Any) -> None:
            factors = v.load(factor)
            for first in range(0, width // LANES, _SLICE):
                vectors = range(first, min(first + _SLICE, width // LANES))

                def step(j: Any, sums: list[Any], vectors: range = vectors) -> list[Any]:
                    value = v.load_int(v.at(where, 8, j))
                    weight = v.spread_from(v.at(s, 4, j))
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
    """``prefetch(where, size)``: have ``size`` bytes in the cache soon."""

    def emit(v: Vectors, where: Any, size: Any) -> None:
        def line(i: Any, _: list[Any]) -> list[Any]:
            v.prefetch(v.at(where, 64, i))
            return []

        v.loop(v.builder.lshr(v.builder.add(size, INT(63)), INT(6)), [], line)

    return types.void(types.int64, types.int64), generator(emit)


prefetch = intrinsic(_prefetch)
