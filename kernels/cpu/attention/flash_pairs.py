"""What :mod:`.flash` does otherwise in bfloat16 on CPUs that multiply pairs of it.

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

from trunkline.kernels.cpu.bfloat16_pairs import (
    PAIR_BYTES,
    PAIR_LANES,
    dot,
    fma,
    join_pairs,
    load_halves,
    load_pairs,
    load_sums,
    no_sums,
    pairs_of,
    spread_pair,
    store_pairs,
    two_to_the,
)
from trunkline.kernels.cpu.exponential import LOG2E
from trunkline.kernels.cpu.threads import OPTIONS, int32s
from trunkline.kernels.cpu.vectors import INT, Vectors, generator

from .flash_tiles import BOUNDS, PANEL, ROW, SPARE, SUMS, cap, hide, move
from .paged_blocks import prefetch


def _tile(rows: int, panels: int, finish: Callable[[Vectors, Any, Any, Any], Any], last: Any) -> Any:
    """``tile(a, a_row, a_step, b, n, c, x, b_apart, c_apart)``: rows of sums over ``n`` pairs, for one or two panels.

    ``b[k]`` are rows of PANEL pairs, ``a[r, k]`` is the pair at ``a + r * a_row + k * a_step``; the
    second panel's ``b`` and ``c`` lie so far after the first's. ``finish`` makes of sums what is
    stored; ``x`` is of type ``last``.
    """

    def typed(
        typing: Any, a: Any, a_row: Any, a_step: Any, b: Any, n: Any, c: Any, x: Any, b_apart: Any, c_apart: Any
    ) -> Any:
        def emit(
            v: Vectors, a: Any, a_row: Any, a_step: Any, b: Any, n: Any, c: Any, x: Any, b_apart: Any, c_apart: Any
        ) -> None:
            starts = [v.at(a, a_row, r) for r in range(rows)]

            def step(k: Any, sums: list[Any]) -> list[Any]:
                place, offset = v.at(b, PAIR_BYTES, k), v.builder.mul(k, a_step)
                right = [load_pairs(v, v.at(place, b_apart, i)) for i in range(panels)]
                result = []
                for r, start in enumerate(starts):
                    left = spread_pair(v, v.builder.add(start, offset))
                    result += [dot(v, sums[panels * r + i], left, pairs) for i, pairs in enumerate(right)]
                return result

            for number, total in enumerate(v.loop(n, no_sums(panels * rows), step)):
                r, second = divmod(number, panels)
                place = v.at(v.at(c, ROW, r), c_apart, second)
                store_pairs(v, finish(v, total, place, v.at(x, c_apart, second) if last is types.int64 else x), place)

        return types.void(*[types.int64] * 6, last, types.int64, types.int64), generator(emit)

    return intrinsic(typed)


def _scaled(v: Vectors, total: Any, _: Any, factor: Any) -> Any:
    return v.builder.fmul(total, v.spread(factor, PAIR_LANES))


def _added(v: Vectors, total: Any, place: Any, factors: Any) -> Any:
    return fma(v, load_sums(v, place), load_sums(v, factors), total)


def _rows(finish: Any, last: Any) -> Any:
    """Any number of rows, or up to three more; of one panel if ``b_apart`` is 0."""

    def walk(panels: int) -> Any:
        tile12, tile4 = (_tile(rows, panels, finish, last) for rows in (12, 4))

        def product(
            a: Any, a_row: Any, a_step: Any, b: Any, n: Any, c: Any, rows: Any, x: Any, b_apart: Any, c_apart: Any
        ) -> None:
            r = np.int64(0)
            while r < rows:
                if rows - r > 8:
                    tile12(a + r * a_row, a_row, a_step, b, n, c + r * ROW, x, b_apart, c_apart)
                    r += 12
                else:
                    tile4(a + r * a_row, a_row, a_step, b, n, c + r * ROW, x, b_apart, c_apart)
                    r += 4

        return njit(**OPTIONS)(product)

    of_one, of_two = walk(1), walk(2)

    def product(
        a: Any, a_row: Any, a_step: Any, b: Any, n: Any, c: Any, rows: Any, x: Any, b_apart: Any, c_apart: Any
    ) -> None:
        if b_apart == 0:
            of_one(a, a_row, a_step, b, n, c, rows, x, b_apart, c_apart)
        else:
            of_two(a, a_row, a_step, b, n, c, rows, x, b_apart, c_apart)

    return njit(**OPTIONS)(product)


def _settle(typing: Any, rows: Any, n: Any, factors: Any) -> Any:
    """``settle(rows, n, factors)``: ``2 n`` rows of float32 times a row become, from the first on, ``n`` of pairs."""

    def emit(v: Vectors, rows: Any, n: Any, factors: Any) -> None:
        factor = load_sums(v, factors)

        def step(i: Any, _: list[Any]) -> list[Any]:
            first = v.at(rows, 2 * ROW, i)
            both = [v.builder.fmul(load_sums(v, v.at(first, ROW, odd)), factor) for odd in range(2)]
            store_pairs(v, pairs_of(v, *both), v.at(rows, ROW, i))
            return []

        v.loop(n, [], step)

    return types.void(*[types.int64] * 3), generator(emit)


def _softmax(typing: Any, s: Any, n: Any, state: Any) -> Any:
    """``softmax(s, n, state)``: as in :mod:`.flash_tiles`, for ``2 n`` rows, which become ``n`` rows of pairs."""

    def emit(v: Vectors, s: Any, n: Any, state: Any) -> None:
        builder, old = v.builder, load_sums(v, state)
        rows = builder.mul(n, INT(2))
        (top,) = v.loop(rows, [old], lambda j, found: [v.larger(load_sums(v, v.at(s, ROW, j)), found[0])])

        def step(i: Any, totals: list[Any]) -> list[Any]:
            first = v.at(s, 2 * ROW, i)
            weights = [two_to_the(v, builder.fsub(load_sums(v, v.at(first, ROW, odd)), top)) for odd in range(2)]
            store_pairs(v, pairs_of(v, *weights), v.at(s, ROW, i))
            return [builder.fadd(*both) for both in zip(totals, weights, strict=True)]

        total = builder.fadd(*v.loop(n, no_sums(2), step))
        factor, before = two_to_the(v, builder.fsub(old, top)), v.at(state, ROW, 1)
        store_pairs(v, top, state)
        store_pairs(v, fma(v, load_sums(v, before), factor, total), before)
        store_pairs(v, factor, v.at(state, ROW, 2))

    return types.void(*[types.int64] * 3), generator(emit)


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
settle, softmax, interleave = map(intrinsic, (_settle, _softmax, _interleave))


_ONE = np.float32(1)
TOGETHER = 2  # panels: each pair of keys or values that is spread over the lanes serves both


def fits(key_dim: int, value_dim: int) -> bool:
    """Are vectors whole numbers of pairs and of PAIR_LANES wide?"""
    return key_dim % 2 == 0 and value_dim % PAIR_LANES == 0


def _copy(a: Any, row: Any, group: Any, low: Any, high: Any, k_block: Any, v_block: Any) -> None:
    """As in :mod:`.flash`, with keys as they are and values in pairs of neighbours; ``low`` is even.

    The last of an odd number is its own neighbour, which gets no weight.
    """
    start, vectors = np.int64(int32s(a.q_start)[row]), a.value_dim // PAIR_LANES
    if a.keys == 0 or np.int64(int32s(a.kv_len)[row]) == np.int64(int32s(a.q_start)[row + 1]) - start:
        k, v = a.k + start * a.k_token + group * a.k_head, a.v + start * a.v_token + group * a.v_head
        for j in range(low, high):
            duplicate(k + j * a.k_token, k_block + (j - low) * a.k_line, a.key_dim // 2, _ONE)
            prefetch(k + j * a.k_token + a.k_head, a.key_dim * 2)  # the next unit's
            prefetch(v + j * a.v_token + a.v_head, a.value_dim * 2)
        for j in range(low, high, 2):
            first, second = v + j * a.v_token, v + min(j + 1, high - 1) * a.v_token
            interleave(first, second, v_block + (j - low) // 2 * a.v_line, vectors)
        return
    slots = int32s(a.table + np.int64(int32s(a.table_row)[row]) * a.max_len * 4)
    k_slot, v_slot = a.groups * a.key_dim * 2, a.groups * a.value_dim * 2
    k, v = a.keys + group * a.key_dim * 2, a.values + group * a.value_dim * 2
    for j in range(low, high):
        duplicate(k + np.int64(slots[j]) * k_slot, k_block + (j - low) * a.k_line, a.key_dim // 2, _ONE)
    for j in range(low, high, 2):
        first, second = v + np.int64(slots[j]) * v_slot, v + np.int64(slots[min(j + 1, high - 1)]) * v_slot
        interleave(first, second, v_block + (j - low) // 2 * a.v_line, vectors)


def _attend(a: Any, low: Any, high: Any, k_block: Any, v_block: Any, s: Any, panel: Any, each: Any) -> None:
    """Two panels, ``each`` bytes apart, or one if that is 0, as in :mod:`.flash`; ``low`` is even.

    What one of them, or a pair of keys, takes in beyond the keys that it sees is hidden.
    """
    begin = max(low, np.int64(int32s(panel + BOUNDS)[0]))
    last = min(high, np.int64(int32s(panel + each + BOUNDS + ROW)[PANEL - 1]))
    if last <= begin:
        return
    begin -= begin & 1
    last += last & 1
    n, apart = last - begin, (a.block + SPARE) * ROW if each > 0 else np.int64(0)
    factor = np.float32(a.scale / a.softcap if a.softcap > 0 else a.scale * LOG2E)
    queries, keys = panel + SUMS + (a.v_rows + SPARE) * ROW, k_block + (begin - low) * a.k_line
    scores(keys, a.k_line, np.int64(4), queries, a.key_dim // 2, s, n, factor, each, apart)
    for i in range(2 if each > 0 else 1):
        own, mine = s + i * apart, panel + i * each
        first, end = int32s(mine + BOUNDS), int32s(mine + BOUNDS + ROW)
        if a.softcap > 0:
            cap(own, n, np.float32(a.softcap * LOG2E))
        # All lanes see the keys [first of the last lane, end of the first lane).
        part = begin if begin < np.int64(first[PANEL - 1]) else max(begin, np.int64(end[0]))
        if part < last:
            hide(own + (part - begin) * ROW, last - part, part, mine + BOUNDS)
        softmax(own, n // 2, mine)
    pairs = v_block + (begin - low) // 2 * a.v_line
    values(pairs, np.int64(4), a.v_line, s, n // 2, panel + SUMS, a.value_dim, panel + 2 * ROW, apart, each)


duplicate = move(False, False, scaled=False)  # pairs, not numbers: not a bit may change
copy, attend = njit(**OPTIONS)(_copy), njit(**OPTIONS)(_attend)
