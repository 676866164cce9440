"""What :mod:`.attention_flash` does otherwise in bfloat16 on CPUs that multiply pairs of it.

Both products take bfloat16 and add up in float32: scores along pairs of neighbouring dimensions,
sums over values along pairs of neighbouring keys. Pairs of keys begin at even positions, whatever
the block, so that results don't depend on how rows are cut.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import intrinsic

from .attention_tiles import BOUNDS, PANEL, ROW, SPARE, SUMS, cap, hide, softmax
from .exponential import LOG2E
from .pairs import (
    PAIR_BYTES,
    PAIR_LANES,
    dot,
    join_pairs,
    load_halves,
    load_pairs,
    load_sums,
    no_sums,
    rounded,
    spread_pair,
    store_pairs,
)
from .threads import OPTIONS, int32s
from .vectors import Vectors, generator


def _tile(rows: int, finish: Callable[[Vectors, Any, Any, Any], Any], last: Any) -> Any:
    """``tile(a, a_row, a_step, b, n, c, x)``: rows of sums over ``n`` pairs, then what ``finish`` makes of them.

    ``b[k]`` are rows of PANEL pairs, ``a[r, k]`` is the pair at ``a + r * a_row + k * a_step``.
    ``x`` is of type ``last``.
    """

    def typed(typing: Any, a: Any, a_row: Any, a_step: Any, b: Any, n: Any, c: Any, x: Any) -> Any:
        def emit(v: Vectors, a: Any, a_row: Any, a_step: Any, b: Any, n: Any, c: Any, x: Any) -> None:
            starts = [v.at(a, a_row, r) for r in range(rows)]

            def step(k: Any, sums: list[Any]) -> list[Any]:
                right, offset = load_pairs(v, v.at(b, PAIR_BYTES, k)), v.builder.mul(k, a_step)
                return [
                    dot(v, total, spread_pair(v, v.builder.add(start, offset)), right)
                    for start, total in zip(starts, sums, strict=True)
                ]

            for r, total in enumerate(v.loop(n, no_sums(rows), step)):
                place = v.at(c, ROW, r)
                store_pairs(v, finish(v, total, place, x), place)

        return types.void(*[types.int64] * 6, last), generator(emit)

    return intrinsic(typed)


def _scaled(v: Vectors, total: Any, _: Any, factor: Any) -> Any:
    return v.builder.fmul(total, v.spread(factor, PAIR_LANES))


def _added(v: Vectors, total: Any, place: Any, factors: Any) -> Any:
    before = v.builder.fmul(load_sums(v, place), load_sums(v, factors))
    return v.builder.fadd(before, total)


def _rows(finish: Any, last: Any) -> Any:
    """Any number of rows, or up to three more."""
    tile16, tile8, tile4 = (_tile(rows, finish, last) for rows in (16, 8, 4))

    def product(a: Any, a_row: Any, a_step: Any, b: Any, n: Any, c: Any, rows: Any, x: Any) -> None:
        r = np.int64(0)
        while r < rows:
            left = rows - r
            if left >= 16:
                tile16(a + r * a_row, a_row, a_step, b, n, c + r * ROW, x)
                r += 16
            elif left >= 8:
                tile8(a + r * a_row, a_row, a_step, b, n, c + r * ROW, x)
                r += 8
            else:
                tile4(a + r * a_row, a_row, a_step, b, n, c + r * ROW, x)
                r += 4

    return njit(**OPTIONS)(product)


def _pair_up(typing: Any, rows: Any, n: Any) -> Any:
    """``pair_up(rows, n)``: ``2 n`` rows of float32 become, from the first on, ``n`` rows of pairs."""

    def emit(v: Vectors, rows: Any, n: Any) -> None:
        def step(i: Any, _: list[Any]) -> list[Any]:
            first = v.at(rows, 2 * ROW, i)
            both = [rounded(v, load_sums(v, v.at(first, ROW, odd))) for odd in range(2)]
            store_pairs(v, join_pairs(v, *both), v.at(rows, ROW, i))
            return []

        v.loop(n, [], step)

    return types.void(types.int64, types.int64), generator(emit)


def _interleave(typing: Any, first: Any, second: Any, target: Any, vectors: Any) -> Any:
    """``interleave(first, second, target, vectors)``: pairs of the bfloat16 numbers at two addresses."""

    def emit(v: Vectors, first: Any, second: Any, target: Any, vectors: Any) -> None:
        def step(i: Any, _: list[Any]) -> list[Any]:
            both = [load_halves(v, v.at(place, 2 * PAIR_LANES, i)) for place in (first, second)]
            store_pairs(v, join_pairs(v, *both), v.at(target, PAIR_BYTES, i))
            return []

        v.loop(vectors, [], step)

    return types.void(*[types.int64] * 4), generator(emit)


scores, values = _rows(_scaled, types.float32), _rows(_added, types.int64)
pair_up, interleave = map(intrinsic, (_pair_up, _interleave))


def fits(key_dim: int, value_dim: int) -> bool:
    """Are vectors whole numbers of pairs and of PAIR_LANES wide?"""
    return key_dim % 2 == 0 and value_dim % PAIR_LANES == 0


def _copy(a: Any, row: Any, group: Any, low: Any, high: Any, k_block: Any, v_block: Any) -> None:
    """As in :mod:`.attention_flash`, with keys as they are and values in pairs of neighbours; ``low`` is even.

    The last of an odd number is its own neighbour, which gets no weight.
    """
    for j in range(low, high):
        k, _ = find(a, row, group, j)
        source, target = int32s(k), int32s(k_block + (j - low) * a.k_line)
        for i in range(a.key_dim // 2):
            target[i] = source[i]
    for j in range(low, high, 2):
        _, first = find(a, row, group, j)
        _, second = find(a, row, group, min(j + 1, high - 1))
        interleave(first, second, v_block + (j - low) // 2 * a.v_line, a.value_dim // PAIR_LANES)


def _find(a: Any, row: Any, group: Any, j: Any) -> Any:
    """Addresses of a row's key and value ``j``: new tokens' if those are all, else in the pool; 2 bytes a number."""
    start = np.int64(int32s(a.q_start)[row])
    if a.keys != 0 and np.int64(int32s(a.kv_len)[row]) > np.int64(int32s(a.q_start)[row + 1]) - start:
        slot = np.int64(int32s(a.table + np.int64(int32s(a.table_row)[row]) * a.max_len * 4)[j])
        place = slot * a.groups + group
        return a.keys + place * a.key_dim * 2, a.values + place * a.value_dim * 2
    return a.k + (start + j) * a.k_token + group * a.k_head, a.v + (start + j) * a.v_token + group * a.v_head


def _attend(a: Any, low: Any, high: Any, k_block: Any, v_block: Any, s: Any, panel: Any) -> None:
    """As in :mod:`.attention_flash`; ``low`` is even. What pairs take in beyond a panel's keys is hidden."""
    first, end = int32s(panel + BOUNDS), int32s(panel + BOUNDS + ROW)
    begin, last = max(low, np.int64(first[0])), min(high, np.int64(end[PANEL - 1]))
    if last <= begin:
        return
    begin -= begin & 1
    last += last & 1
    n = last - begin
    factor = np.float32(a.scale / a.softcap if a.softcap > 0 else a.scale * LOG2E)
    queries = panel + SUMS + (a.v_rows + SPARE) * ROW
    scores(k_block + (begin - low) * a.k_line, a.k_line, np.int64(4), queries, a.key_dim // 2, s, n, factor)
    if a.softcap > 0:
        cap(s, n, np.float32(a.softcap * LOG2E))
    # All lanes see the keys [first of the last lane, end of the first lane).
    part = begin if begin < np.int64(first[PANEL - 1]) else max(begin, np.int64(end[0]))
    if part < last:
        hide(s + (part - begin) * ROW, last - part, part, panel + BOUNDS)
    softmax(s, n, panel)
    pair_up(s, n // 2)
    place = v_block + (begin - low) // 2 * a.v_line
    values(place, np.int64(4), a.v_line, s, n // 2, panel + SUMS, a.value_dim, panel + 2 * ROW)


find = njit(**OPTIONS)(_find)
copy, attend = njit(**OPTIONS)(_copy), njit(**OPTIONS)(_attend)
