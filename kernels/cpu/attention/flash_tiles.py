"""The inner loops of :mod:`.flash`, as SIMD code. Rows are PANEL float32 wide: one lane per query vector.

All are intrinsics over addresses, row lengths in bytes, and counts of at least 1.
"""

from __future__ import annotations

import math
from typing import Any

from numba import types
from numba.extending import intrinsic

from trunkline.kernels.cpu.vectors import BITS, BYTES, INT, LANES, Vectors, all_lanes, generator

PANEL = 2 * LANES  # query vectors of a panel
ROW = 2 * BYTES  # of a panel
LOWEST = -3.0e38  # initial value of the largest score; finite, so that differences of scores aren't NaN

# A panel in scratch memory, in rows of 16 numbers, byte offsets on the left:
#   0       largest scores, sums of weights, rescaling factors (see _softmax)
#   BOUNDS  as int32: the keys [first, end) that each lane sees
#   SUMS    sums over values [value width + SPARE]
#   then    queries [key width]
BOUNDS, SUMS = 3 * ROW, 5 * ROW
SPARE = 4  # padding rows: a tile has at least 4 rows, so it may read or write beyond the last one


def register_tile(rows: int) -> Any:
    """``register_tile(a, a_row, a_step, b, n, c, factor)``: a product with all accumulators in registers.

    ``c[r] = sum over k < n of a[r, k] * b[k]`` for ``rows`` rows r, where ``b[k]`` and ``c[r]`` are
    rows of a panel and ``a[r, k]`` is the number at ``a + r * a_row + k * a_step``. ``factor`` is the
    address of a row, and then the old ``c[r] * factor`` is added; or 0.
    """

    def typed(typing: Any, a: Any, a_row: Any, a_step: Any, b: Any, n: Any, c: Any, factor: Any) -> Any:
        def emit(v: Vectors, a: Any, a_row: Any, a_step: Any, b: Any, n: Any, c: Any, factor: Any) -> None:
            starts = [v.at(a, a_row, r) for r in range(rows)]

            def step(k: Any, sums: list[Any]) -> list[Any]:
                right, offset, result = _row(v, v.at(b, ROW, k)), v.builder.mul(k, a_step), []
                for r, start in enumerate(starts):
                    left = v.load_broadcast(v.builder.add(start, offset))
                    result += [v.fma(left, x, sums[2 * r + i]) for i, x in enumerate(right)]
                return result

            sums = v.loop(n, [all_lanes(0.0)] * (2 * rows), step)
            places = [v.at(c, BYTES, i) for i in range(2 * rows)]
            with v.builder.if_else(v.builder.icmp_signed("==", factor, INT(0))) as (fresh, added):
                with fresh:
                    for where, total in zip(places, sums, strict=True):
                        v.store(total, where)
                with added:
                    factors = _row(v, factor) * rows
                    for where, total, old in zip(places, sums, factors, strict=True):
                        v.store(v.fma(v.load(where), old, total), where)

        return types.void(*[types.int64] * 7), generator(emit)

    return intrinsic(typed)


def convert(from_half: bool, to_half: bool, scaled: bool = True) -> Any:
    """``convert(source, target, n, factor)``: copy ``n`` numbers times ``factor``, between float32 and bfloat16.

    Without ``scaled``, bits are copied unchanged and ``factor`` is ignored.
    """
    source_size, target_size = 2 if from_half else 4, 2 if to_half else 4

    def typed(typing: Any, source: Any, target: Any, n: Any, factor: Any) -> Any:
        def emit(v: Vectors, source: Any, target: Any, n: Any, factor: Any) -> None:
            builder, factors = v.builder, v.broadcast(factor)

            def some(first: Any, lanes: int) -> list[Any]:
                x = v.load(v.at(source, source_size, first), from_half, lanes)
                if scaled:
                    x = builder.fmul(x, factors if lanes == LANES else factor)
                v.store(x, v.at(target, target_size, first), to_half, lanes)
                return []

            whole = builder.and_(n, INT(-LANES))
            with builder.if_then(builder.icmp_signed(">", whole, INT(0))):
                v.loop(builder.lshr(whole, INT(3)), [], lambda i, _: some(builder.mul(i, INT(LANES)), LANES))
            with builder.if_then(builder.icmp_signed(">", n, whole)):
                v.loop(builder.sub(n, whole), [], lambda i, _: some(builder.add(whole, i), 1))

        return types.void(types.int64, types.int64, types.int64, types.float32), generator(emit)

    return intrinsic(typed)


def _mask(typing: Any, s: Any, n: Any, key: Any, bounds: Any) -> Any:
    """``mask(s, n, key, bounds)``: set the scores of keys that a lane doesn't see to -inf.

    Row ``j`` of ``s`` belongs to key ``key + j``. ``bounds`` are two rows of int32: each lane sees the
    keys from the first number up to, but not including, the second.
    """

    def emit(v: Vectors, s: Any, n: Any, key: Any, bounds: Any) -> None:
        builder = v.builder
        first, end = ([v.bits(x) for x in _row(v, v.at(bounds, ROW, r))] for r in range(2))

        def step(j: Any, _: list[Any]) -> list[Any]:
            number = v.broadcast(builder.trunc(builder.add(key, j), BITS.element))
            for i in range(2):
                where = v.at(v.at(s, ROW, j), BYTES, i)
                seen = builder.and_(
                    builder.icmp_signed(">=", number, first[i]), builder.icmp_signed("<", number, end[i])
                )
                v.store(builder.select(seen, v.load(where), all_lanes(-math.inf)), where)
            return []

        v.loop(n, [], step)

    return types.void(*[types.int64] * 4), generator(emit)


def _softmax(typing: Any, s: Any, n: Any, state: Any) -> Any:
    """``softmax(s, n, state)``: one step of the online softmax, ``s[:n] = 2 ** (s - largest)`` in each lane.

    ``state`` has three rows: the largest score so far, the sum of weights so far, and as a result the
    factor that rescales earlier weights to the new largest score. Scores are multiplied by log2(e) before.
    """

    def emit(v: Vectors, s: Any, n: Any, state: Any) -> None:
        def largest(j: Any, found: list[Any]) -> list[Any]:
            return [v.maximum(x, y) for x, y in zip(_row(v, v.at(s, ROW, j)), found, strict=True)]

        old = _row(v, state)
        top = v.loop(n, old, largest)

        def weigh(j: Any, totals: list[Any]) -> list[Any]:
            where, result = v.at(s, ROW, j), []
            for i, x in enumerate(_row(v, where)):
                weight = v.exp2(v.builder.fsub(x, top[i]))
                v.store(weight, v.at(where, BYTES, i))
                result.append(v.builder.fadd(totals[i], weight))
            return result

        totals = v.loop(n, [all_lanes(0.0)] * 2, weigh)
        for i, before in enumerate(_row(v, v.at(state, ROW, 1))):
            factor = v.exp2(v.builder.fsub(old[i], top[i]))
            v.store(top[i], v.at(state, BYTES, i))
            v.store(v.fma(before, factor, totals[i]), v.at(state, BYTES, 2 + i))
            v.store(factor, v.at(state, BYTES, 4 + i))

    return types.void(*[types.int64] * 3), generator(emit)


def _apply_softcap(typing: Any, s: Any, n: Any, factor: Any) -> Any:
    """``apply_softcap(s, n, factor)``: ``s[:n] = factor * tanh(s)``."""

    def emit(v: Vectors, s: Any, n: Any, factor: Any) -> None:
        factors = v.broadcast(factor)

        def step(i: Any, _: list[Any]) -> list[Any]:
            where = v.at(s, BYTES, i)
            v.store(v.builder.fmul(v.tanh(v.load(where)), factors), where)
            return []

        v.loop(v.builder.mul(n, INT(2)), [], step)

    return types.void(types.int64, types.int64, types.float32), generator(emit)


def _transpose(typing: Any, source: Any, source_row: Any, target: Any, target_row: Any) -> Any:
    """``transpose(source, source_row, target, target_row)``: transpose LANES x LANES float32 numbers."""

    def emit(v: Vectors, source: Any, source_row: Any, target: Any, target_row: Any) -> None:
        rows = [v.load(v.at(source, source_row, r)) for r in range(LANES)]
        for r, row in enumerate(v.transposed(rows)):
            v.store(row, v.at(target, target_row, r))

    return types.void(*[types.int64] * 4), generator(emit)


def _row(v: Vectors, where: Any) -> list[Any]:
    """Load a row of a panel: two vectors."""
    return [v.load(where), v.load(v.at(where, BYTES, 1))]


mask, softmax, apply_softcap, transpose = map(intrinsic, (_mask, _softmax, _apply_softcap, _transpose))
