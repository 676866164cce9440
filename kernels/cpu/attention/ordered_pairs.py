"""The bfloat16 variant of :mod:`.ordered`, for CPUs with AVX512_BF16: results have the bits of :mod:`.flash_pairs`.

Products take pairs of bfloat16 numbers, in the order of :mod:`.flash_pairs`: in the scores, neighbouring dimensions of
a key; in the sums over values, neighbouring keys, beginning at even positions. Here, lanes are keys, then dimensions,
so that none is idle with few query heads::

    keys of a block      tile of 32 keys, pairs transposed: [width / 2, 32]
                         scores of up to four query heads x 32 keys         8 of 32 AVX-512 registers
    weights              softmax over the block, for one head after the other; also rounded to bfloat16
    values of a block    weight pairs x value pairs of up to four heads and 64 dimensions     16 registers
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import njit

from trunkline.kernels.cpu.bfloat16_pairs import PAIR_LANES
from trunkline.kernels.cpu.exponential import LOG2E
from trunkline.kernels.cpu.threads import OPTIONS, Kernel, float32s, int32s, thread
from trunkline.kernels.cpu.vectors import LANES

from . import one_query
from .flash_pairs import copy_bits
from .flash_tiles import LOWEST, apply_softcap
from .ordered import Arguments, for_each_head, locate, padded, prefetch_slots
from .ordered_blocks import TILE, TILE_BYTES, transpose_keys
from .ordered_pairs_blocks import STATE_BYTES, accumulate, scores, store_scaled, weigh

_HEADS = (4, 2, 1)  # query heads that are computed together
_LOWEST = np.float32(LOWEST)


def scratch_bytes(group_size: int, key_dim: int, value_dim: int, block_keys: int) -> int:
    """Scratch bytes of one thread, for ``group_size`` query heads per KV head."""
    keys, row = padded(key_dim // 2), 4 * (block_keys + TILE)
    head = _sums_bytes(value_dim) + row + row // 2  # scores, rounded weights
    return group_size * head + keys * TILE_BYTES + 4 * row + 4 * block_keys * keys + 64


def _sums_bytes(value_dim: int) -> int:
    """Bytes of a head's sums over values and its state."""
    return 4 * value_dim + STATE_BYTES


def _score(key_dim: int) -> Any:
    """Compiled ``score(a, queries, tile, s, s_row, group_size)``: the scores of all query heads for a tile of keys."""
    score4, score2, score1 = (scores(heads) for heads in _HEADS)

    def score(a: Any, queries: Any, tile: Any, s: Any, s_row: Any, group_size: Any) -> None:
        h, row, width = np.int64(0), a.q_head * 2, np.int64(key_dim // 2)
        factor = np.float32(a.scale / a.softcap if a.softcap > 0 else a.scale * LOG2E)
        while h < group_size:
            query, place = queries + h * row, s + h * s_row
            if group_size - h >= 4:
                score4(query, row, tile, width, place, s_row, factor)
                h += 4
            elif group_size - h >= 2:
                score2(query, row, tile, width, place, s_row, factor)
                h += 2
            else:
                score1(query, row, tile, width, place, s_row, factor)
                h += 1

    return njit(**OPTIONS)(score)


def _add_block(value_dim: int) -> Any:
    """Compiled ``add_block(a, s, s_row, n, skipped, values, states, rounded, group_size)``: softmax and sums of all
    query heads over ``n`` keys, whose scores are in ``s``; the first ``skipped`` of them, 0 or 1, have no weight."""
    accumulate4, accumulate2, accumulate1 = (accumulate(heads, value_dim) for heads in _HEADS)
    state_row = _sums_bytes(value_dim)

    def add_block(
        a: Any, s: Any, s_row: Any, n: Any, skipped: Any, values: Any, states: Any, rounded: Any, group_size: Any
    ) -> None:
        vectors, row, half_row = (n + PAIR_LANES - 1) // PAIR_LANES, np.int64(state_row), s_row // 2
        for i in range(group_size):
            place = s + i * s_row
            if a.softcap > 0:
                apply_softcap(place, vectors, np.float32(a.softcap * LOG2E))
            numbers = float32s(place)
            for j in range(skipped):
                numbers[j] = -np.inf
            for j in range(n, vectors * PAIR_LANES):
                numbers[j] = -np.inf
            weigh(place, vectors, states + i * row + 4 * value_dim, rounded + i * half_row)
        h, pairs = np.int64(0), (n + 1) // 2
        while h < group_size:
            state, place, weights = states + h * row, s + h * s_row, rounded + h * half_row
            if group_size - h >= 4:
                accumulate4(state, row, values, pairs, place, s_row, weights)
                h += 4
            elif group_size - h >= 2:
                accumulate2(state, row, values, pairs, place, s_row, weights)
                h += 2
            else:
                accumulate1(state, row, values, pairs, place, s_row, weights)
                h += 1

    return njit(**OPTIONS)(add_block)


def _unit(key_dim: int, value_dim: int) -> Any:
    """Compiled attention of one row and one KV head."""
    key_pairs, value_pairs, keys = key_dim // 2, value_dim // 2, padded(key_dim // 2)
    find_keys, find_values = (locate(width, 4, copy_bits) for width in (key_pairs, value_pairs))
    fetch_keys, fetch_values = (prefetch_slots(width, 4) for width in (key_pairs, value_pairs))
    transpose, score, add_block = transpose_keys(keys, False), _score(key_dim), _add_block(value_dim)
    state_bytes = _sums_bytes(value_dim)

    def unit(a: Any, row: Any, kv_head: Any) -> None:
        group_size, slots = a.heads // a.kv_heads, one_query.slots_of(a, row)
        states, s_row = a.scratch + np.int64(thread()) * a.scratch_size, np.int64(4 * (a.block_keys + TILE))
        s = states + group_size * state_bytes
        rounded = s + group_size * s_row
        tile = rounded + group_size * s_row // 2
        key_list = tile + keys * TILE_BYTES
        value_list = key_list + 2 * s_row
        copies = value_list + 2 * s_row
        token, head = np.int64(int32s(a.q_start)[row]), kv_head * group_size
        queries = a.q + (token * a.q_token + head * a.q_head) * 2
        for h in range(group_size):
            state = float32s(states + h * state_bytes)
            for d in range(state_bytes // 4):
                state[d] = np.float32(0)
            for d in range(value_dim, value_dim + PAIR_LANES):
                state[d] = _LOWEST
        end = np.int64(int32s(a.kv_len)[row])
        first = one_query.first_key(a, end - 1)
        low = first - (first & 1)
        while low < end:
            high = min(end, (low // a.block_keys + 1) * a.block_keys)
            n = high - low
            for start in range(0, n, TILE):
                count, here = min(np.int64(TILE), n - start), int32s(slots + (low + start) * 4)
                find_keys(a.keys, here, count, a.kv_heads * key_pairs, kv_head * key_pairs, key_list, copies)
                fetch_values(a.values, here, count, a.kv_heads, kv_head)  # read when all scores are there
                transpose(key_list, (count + LANES - 1) // LANES, tile)
                score(a, queries, tile, s + start * 4, s_row, group_size)
            here = int32s(slots + low * 4)
            find_values(a.values, here, n, a.kv_heads * value_pairs, kv_head * value_pairs, value_list, copies)
            fetch_keys(a.keys, int32s(slots + high * 4), min(np.int64(TILE), end - high), a.kv_heads, kv_head)
            add_block(a, s, s_row, n, max(first - low, np.int64(0)), value_list, states, rounded, group_size)
            low = high
        for h in range(group_size):
            total = states + h * state_bytes
            state = float32s(total + 4 * value_dim)
            factor = one_query.normalizer(a, head + h, state[0], state[PAIR_LANES])
            out = a.out + (token * a.heads + head + h) * value_dim * 2
            store_scaled(total, np.int64(value_dim // PAIR_LANES), factor, out)

    return njit(**OPTIONS)(unit)


@cache
def kernel(key_dim: int, value_dim: int) -> Kernel:
    """The compiled kernel for these widths, see :func:`.flash_pairs.fits`."""
    return Kernel(for_each_head(_unit(key_dim, value_dim)), Arguments)
