"""The bfloat16 variant of the inner loops of :mod:`.flash`, for CPUs with AVX512_BF16.

Both products take pairs of bfloat16 numbers and accumulate in float32. In the scores, a pair is two
neighbouring dimensions of a key; in the sums over values, it is the same dimension of two neighbouring
keys. Pairs of keys begin at even positions in every block, so that results don't depend on how a prompt
is chunked.
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
    exp2,
    fma,
    join_pairs,
    load_broadcast_pair,
    load_halves,
    load_pairs,
    load_sums,
    no_sums,
    pairs_of,
    store_pairs,
)
from trunkline.kernels.cpu.exponential import LOG2E
from trunkline.kernels.cpu.threads import OPTIONS, int32s
from trunkline.kernels.cpu.vectors import INT, Vectors, generator

from .flash_tiles import BOUNDS, PANEL, ROW, SPARE, SUMS, apply_softcap, convert, mask
from .paged_blocks import prefetch


def _tile(rows: int, panels: int, finish: Callable[[Vectors, Any, Any, Any], Any], last: Any) -> Any:
    """``tile(a, a_row, a_step, b, n, c, x, b_panel, c_panel)``: the product for ``rows`` rows and 1 or 2 panels.

    Accumulates ``c[r] = sum over k < n of a[r, k] * b[k]`` in registers. ``b[k]`` is a row of PANEL pairs,
    and ``a[r, k]`` the pair at ``a + r * a_row + k * a_step``. ``b_panel`` and ``c_panel`` are the bytes
    from the first panel's ``b`` and ``c`` to the second's. The epilogue ``finish`` computes what is
    stored; its argument ``x`` is of type ``last``.
    """

    def typed(
        typing: Any, a: Any, a_row: Any, a_step: Any, b: Any, n: Any, c: Any, x: Any, b_panel: Any, c_panel: Any
    ) -> Any:
        def emit(
            v: Vectors, a: Any, a_row: Any, a_step: Any, b: Any, n: Any, c: Any, x: Any, b_panel: Any, c_panel: Any
        ) -> None:
            starts = [v.at(a, a_row, r) for r in range(rows)]

            def step(k: Any, sums: list[Any]) -> list[Any]:
                place, offset = v.at(b, PAIR_BYTES, k), v.builder.mul(k, a_step)
                right = [load_pairs(v, v.at(place, b_panel, i)) for i in range(panels)]
                result = []
                for r, start in enumerate(starts):
                    left = load_broadcast_pair(v, v.builder.add(start, offset))
                    result += [dot(v, sums[panels * r + i], left, pairs) for i, pairs in enumerate(right)]
                return result

            for number, total in enumerate(v.loop(n, no_sums(panels * rows), step)):
                r, second = divmod(number, panels)
                place = v.at(v.at(c, ROW, r), c_panel, second)
                store_pairs(v, finish(v, total, place, v.at(x, c_panel, second) if last is types.int64 else x), place)

        return types.void(*[types.int64] * 6, last, types.int64, types.int64), generator(emit)

    return intrinsic(typed)


def _scale(v: Vectors, total: Any, _: Any, factor: Any) -> Any:
    """Epilogue of the scores: ``total * factor``."""
    return v.builder.fmul(total, v.broadcast(factor, PAIR_LANES))


def _rescale_and_add(v: Vectors, total: Any, place: Any, factors: Any) -> Any:
    """Epilogue of the sums over values: ``c * factors + total``; see :func:`.flash_tiles._softmax`."""
    return fma(v, load_sums(v, place), load_sums(v, factors), total)


def _rows(finish: Any, last: Any) -> Any:
    """The product for any number of rows, of two panels, or of one if ``b_panel`` is 0.

    Up to three more rows may be written.
    """

    def for_panels(panels: int) -> Any:
        tile12, tile4 = (_tile(rows, panels, finish, last) for rows in (12, 4))

        def product(
            a: Any, a_row: Any, a_step: Any, b: Any, n: Any, c: Any, rows: Any, x: Any, b_panel: Any, c_panel: Any
        ) -> None:
            r = np.int64(0)
            while r < rows:
                if rows - r > 8:
                    tile12(a + r * a_row, a_row, a_step, b, n, c + r * ROW, x, b_panel, c_panel)
                    r += 12
                else:
                    tile4(a + r * a_row, a_row, a_step, b, n, c + r * ROW, x, b_panel, c_panel)
                    r += 4

        return njit(**OPTIONS)(product)

    one_panel, two_panels = for_panels(1), for_panels(2)

    def product(
        a: Any, a_row: Any, a_step: Any, b: Any, n: Any, c: Any, rows: Any, x: Any, b_panel: Any, c_panel: Any
    ) -> None:
        if b_panel == 0:
            one_panel(a, a_row, a_step, b, n, c, rows, x, b_panel, c_panel)
        else:
            two_panels(a, a_row, a_step, b, n, c, rows, x, b_panel, c_panel)

    return njit(**OPTIONS)(product)


def _scale_to_pairs(typing: Any, rows: Any, n: Any, factors: Any) -> Any:
    """``scale_to_pairs(rows, n, factors)``: multiply ``2 n`` float32 rows by ``factors``, and round them in place.

    Each two rows become one row of bfloat16 pairs, so ``n`` rows remain.
    """

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
    """``softmax(s, n, state)``: as in :mod:`.flash_tiles`, for ``2 n`` rows; the weights become ``n`` rows of pairs."""

    def emit(v: Vectors, s: Any, n: Any, state: Any) -> None:
        builder, old = v.builder, load_sums(v, state)
        rows = builder.mul(n, INT(2))
        (top,) = v.loop(rows, [old], lambda j, found: [v.maximum(load_sums(v, v.at(s, ROW, j)), found[0])])

        def step(i: Any, totals: list[Any]) -> list[Any]:
            first = v.at(s, 2 * ROW, i)
            weights = [exp2(v, builder.fsub(load_sums(v, v.at(first, ROW, odd)), top)) for odd in range(2)]
            store_pairs(v, pairs_of(v, *weights), v.at(s, ROW, i))
            return [builder.fadd(*both) for both in zip(totals, weights, strict=True)]

        total = builder.fadd(*v.loop(n, no_sums(2), step))
        factor, before = exp2(v, builder.fsub(old, top)), v.at(state, ROW, 1)
        store_pairs(v, top, state)
        store_pairs(v, fma(v, load_sums(v, before), factor, total), before)
        store_pairs(v, factor, v.at(state, ROW, 2))

    return types.void(*[types.int64] * 3), generator(emit)


def _interleave(typing: Any, first: Any, second: Any, target: Any, vectors: Any) -> Any:
    """``interleave(first, second, target, vectors)``: pairs made of the bfloat16 vectors at two addresses."""

    def emit(v: Vectors, first: Any, second: Any, target: Any, vectors: Any) -> None:
        def step(i: Any, _: list[Any]) -> list[Any]:
            both = [load_halves(v, v.at(place, 2 * PAIR_LANES, i)) for place in (first, second)]
            store_pairs(v, join_pairs(v, *both), v.at(target, PAIR_BYTES, i))
            return []

        v.loop(vectors, [], step)

    return types.void(*[types.int64] * 4), generator(emit)


scores, values = _rows(_scale, types.float32), _rows(_rescale_and_add, types.int64)
scale_to_pairs, softmax, interleave = map(intrinsic, (_scale_to_pairs, _softmax, _interleave))


_ONE = np.float32(1)
PANELS_PER_CALL = 2  # each pair of a key or value is broadcast once and multiplied by both panels


def fits(key_dim: int, value_dim: int) -> bool:
    """Whether this variant supports the head widths: keys in whole pairs, values in whole vectors."""
    return key_dim % 2 == 0 and value_dim % PAIR_LANES == 0


def _copy(a: Any, row: Any, kv_head: Any, low: Any, high: Any, k_block: Any, v_block: Any) -> None:
    """Copy keys and values ``[low, high)`` of a row, as in :mod:`.flash`; ``low`` is even.

    Keys are copied unchanged. Values of each two neighbouring keys are interleaved into pairs. If the number
    of keys is odd, the last one is paired with itself; the mask gives the second copy no weight.
    """
    start, vectors = np.int64(int32s(a.q_start)[row]), a.value_dim // PAIR_LANES
    new = np.int64(int32s(a.q_start)[row + 1]) - start
    if a.keys == 0 or np.int64(int32s(a.kv_len)[row]) == new:
        k, v = a.k + start * a.k_token + kv_head * a.k_head, a.v + start * a.v_token + kv_head * a.v_head
        for j in range(low, high):
            copy_bits(k + j * a.k_token, k_block + (j - low) * a.k_stride, a.key_dim // 2, _ONE)
            prefetch(k + j * a.k_token + a.k_head, a.key_dim * 2)  # of the next unit, the next KV head
            prefetch(v + j * a.v_token + a.v_head, a.value_dim * 2)
        for j in range(low, high, 2):
            first, second = v + j * a.v_token, v + min(j + 1, high - 1) * a.v_token
            interleave(first, second, v_block + (j - low) // 2 * a.v_stride, vectors)
        return
    slots = int32s(a.table + np.int64(int32s(a.table_row)[row]) * a.max_len * 4)
    k_slot, v_slot = a.kv_heads * a.key_dim * 2, a.kv_heads * a.value_dim * 2
    k, v = a.keys + kv_head * a.key_dim * 2, a.values + kv_head * a.value_dim * 2
    for j in range(low, high):
        copy_bits(k + np.int64(slots[j]) * k_slot, k_block + (j - low) * a.k_stride, a.key_dim // 2, _ONE)
    for j in range(low, high, 2):
        first, second = v + np.int64(slots[j]) * v_slot, v + np.int64(slots[min(j + 1, high - 1)]) * v_slot
        interleave(first, second, v_block + (j - low) // 2 * a.v_stride, vectors)


def _attend(a: Any, low: Any, high: Any, k_block: Any, v_block: Any, s: Any, panel: Any, panel_bytes: Any) -> None:
    """As in :mod:`.flash`, for two panels ``panel_bytes`` apart, or for one if that is 0; ``low`` is even.

    Both panels compute the same range of keys, in whole pairs; the mask removes those that a panel doesn't see.
    """
    begin = max(low, np.int64(int32s(panel + BOUNDS)[0]))
    last = min(high, np.int64(int32s(panel + panel_bytes + BOUNDS + ROW)[PANEL - 1]))
    if last <= begin:
        return
    begin -= begin & 1
    last += last & 1
    n, score_bytes = last - begin, (a.block_keys + SPARE) * ROW if panel_bytes > 0 else np.int64(0)
    factor = np.float32(a.scale / a.softcap if a.softcap > 0 else a.scale * LOG2E)
    queries, keys = panel + SUMS + (a.v_rows + SPARE) * ROW, k_block + (begin - low) * a.k_stride
    scores(keys, a.k_stride, np.int64(4), queries, a.key_dim // 2, s, n, factor, panel_bytes, score_bytes)
    for i in range(2 if panel_bytes > 0 else 1):
        own, mine = s + i * score_bytes, panel + i * panel_bytes
        first, end = int32s(mine + BOUNDS), int32s(mine + BOUNDS + ROW)
        if a.softcap > 0:
            apply_softcap(own, n, np.float32(a.softcap * LOG2E))
        # No mask is needed where all lanes see all keys: [first of the last lane, end of the first lane).
        mask_from = begin if begin < np.int64(first[PANEL - 1]) else max(begin, np.int64(end[0]))
        if mask_from < last:
            mask(own + (mask_from - begin) * ROW, last - mask_from, mask_from, mine + BOUNDS)
        softmax(own, n // 2, mine)
    pairs = v_block + (begin - low) // 2 * a.v_stride
    values(
        pairs, np.int64(4), a.v_stride, s, n // 2, panel + SUMS, a.value_dim, panel + 2 * ROW, score_bytes, panel_bytes
    )


# Pairs of bfloat16, moved as float32: arithmetic on them would change bits.
copy_bits = convert(False, False, scaled=False)
copy, attend = njit(**OPTIONS)(_copy), njit(**OPTIONS)(_attend)
