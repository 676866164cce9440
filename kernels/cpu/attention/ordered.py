"""Attention of rows with one query, whose results have the same bits as those of :mod:`.flash` in float32.

:mod:`.paged` adds across lanes, and divides the keys of a pass over the threads. Here, as in :mod:`.flash`, a score is
added up in the order of the dimensions, and a block's weights and weighted values in the order of the keys; blocks
begin at multiples of ``block_keys``, the block size of :mod:`.flash`. So a query's result doesn't depend on whether it
was alone in its row.

A unit of work is one row and one KV head, with all query heads that share it::

    keys of a block      tile of 32 keys, transposed: [width, 32]       lanes are keys: no sum across lanes
                         scores of two query heads x 32 keys            8 of 16 AVX registers
    weights              softmax over the block, for one head after the other
    values of a block    weight j x value j, for one head after the other; lanes are dimensions

The keys of a row aren't divided over threads. So one long request uses at most as many threads as it has KV heads.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import njit

from trunkline.kernels.cpu.exponential import LOG2E
from trunkline.kernels.cpu.quantized import cache as int8_cache
from trunkline.kernels.cpu.threads import OPTIONS, Kernel, claim, float32s, int32s, int64s, thread, threads
from trunkline.kernels.cpu.vectors import LANES
from trunkline.kernels.quantized.cache import stored_width

from . import one_query
from .flash_tiles import LOWEST, apply_softcap, convert
from .ordered_blocks import TILE, TILE_BYTES, accumulate, scores, transpose_keys, weigh
from .paged_blocks import prefetch

_ZERO, _ONE, _LOWEST = np.float32(0), np.float32(1), np.float32(LOWEST)


class Arguments(one_query.Arguments):
    """The kernel's arguments."""

    scratch_size: int  # of one thread
    claimed: int  # units of work that threads have claimed so far
    block_keys: int  # keys of a block


def scratch_bytes(group_size: int, key_dim: int, value_dim: int, block_keys: int) -> int:
    """Scratch bytes of one thread, for ``group_size`` query heads per KV head."""
    keys, values = padded(key_dim), padded(value_dim)
    head = 4 * (keys + values + 3 * LANES + block_keys + TILE)  # a query; sums and state; scores
    copies = 4 * block_keys * (keys + values)
    return group_size * head + keys * TILE_BYTES + 2 * 8 * (block_keys + TILE) + copies + 64


def padded(width: int) -> int:
    """``width``, rounded up to LANES."""
    return -(-width // LANES) * LANES


def locate(width: int, size: int, load: Any, copied: bool = False) -> Any:
    """Compiled ``locate(pool, slots, n, stride, offset, where, copies)``: the addresses of ``n`` keys or values.

    They are written to ``where``; the last one is repeated up to a multiple of LANES. Numbers, of ``size`` bytes, are
    used where they are in the pool, if the width is a multiple of LANES. Else, or if ``copied``, ``load`` copies them,
    4 bytes each, padded with zeros.
    """
    whole = padded(width)
    copied = copied or whole != width

    def locate(pool: Any, slots: Any, n: Any, stride: Any, offset: Any, where: Any, copies: Any) -> None:
        addresses = int64s(where)
        for j in range(n):
            source = pool + (np.int64(slots[j]) * stride + offset) * size
            if copied:
                addresses[j] = copies + j * whole * 4
                load(source, addresses[j], width, _ONE)
                vector = float32s(addresses[j])
                for d in range(width, whole):
                    vector[d] = _ZERO
            else:
                addresses[j] = source
        for j in range(n, (n + LANES - 1) // LANES * LANES):
            addresses[j] = addresses[n - 1]

    return njit(**OPTIONS)(locate)


def _score(key_dim: int) -> Any:
    """Compiled ``score(queries, tile, s, s_row, group_size)``: the scores of all query heads for one tile of keys."""
    score1, score2, query_row = scores(1), scores(2), padded(key_dim) * 4

    def score(queries: Any, tile: Any, s: Any, s_row: Any, group_size: Any) -> None:
        h, row, width = np.int64(0), np.int64(query_row), np.int64(key_dim)
        while h + 2 <= group_size:
            score2(queries + h * row, row, tile, width, s + h * s_row, s_row)
            h += 2
        if h < group_size:
            score1(queries + h * row, row, tile, width, s + h * s_row, s_row)

    return njit(**OPTIONS)(score)


def _start(key_dim: int, value_dim: int, bf16: bool) -> Any:
    """Compiled ``start(a, row, head, queries, states)``: load the queries of a unit and initialise their states."""
    keys, values = padded(key_dim), padded(value_dim)

    def start(a: Any, row: Any, head: Any, queries: Any, states: Any) -> None:
        token = np.int64(int32s(a.q_start)[row])
        for h in range(a.heads // a.kv_heads):
            one_query.load_query(a, token, head + h, key_dim, bf16, queries + h * keys * 4)
            state = float32s(states + h * 4 * (values + 3 * LANES))
            for d in range(values + 3 * LANES):
                state[d] = _ZERO
            for d in range(values, values + LANES):
                state[d] = _LOWEST

    return njit(**OPTIONS)(start)


def _add_block(value_dim: int, bf16: bool) -> Any:
    """Compiled ``add_block(a, s, n, values, state)``: one head's softmax and sums over ``n`` keys, whose scores are in
    ``s``, and whose values, bfloat16 if ``bf16``, are at the addresses in ``values``."""
    width = padded(value_dim)
    accumulated = accumulate(width, bf16)

    def add_block(a: Any, s: Any, n: Any, values: Any, total: Any) -> None:
        vectors, state, rest = (n + LANES - 1) // LANES, total + width * 4, float32s(s)
        if a.softcap > 0:
            apply_softcap(s, (vectors + 1) // 2, np.float32(a.softcap * LOG2E))
        for j in range(n, vectors * LANES):
            rest[j] = -np.inf
        weigh(s, vectors, state)
        accumulated(total, values, n, s, state)

    return njit(**OPTIONS)(add_block)


def prefetch_slots(width: int, size: int) -> Any:
    """Compiled ``prefetch_slots(pool, slots, n, kv_heads, kv_head)``, of keys or values; one has ``width`` numbers."""

    def prefetch_slots(pool: Any, slots: Any, n: Any, kv_heads: Any, kv_head: Any) -> None:
        for j in range(n):
            number = np.int64(slots[j]) * kv_heads + kv_head
            prefetch(pool + number * width * size, np.int64(width * size))

    return njit(**OPTIONS)(prefetch_slots)


def _unit(key_dim: int, value_dim: int, bf16: bool, int8: bool) -> Any:
    """Compiled attention of one row and one KV head."""
    keys, values, size = padded(key_dim), padded(value_dim), 1 if int8 else 2 if bf16 else 4
    key_row, value_row = (stored_width(width) if int8 else width for width in (key_dim, value_dim))
    state_bytes = 4 * (values + 3 * LANES)
    load = int8_cache.load if int8 else convert(bf16, False)
    find_keys, find_values = (locate(width, size, load, copied=int8) for width in (key_dim, value_dim))
    fetch_keys, fetch_values = prefetch_slots(key_row, size), prefetch_slots(value_row, size)
    halves = bf16 and not int8  # where numbers are used in the pool
    transpose = transpose_keys(keys, halves and keys == key_dim)
    score, add_block = _score(key_dim), _add_block(value_dim, halves and values == value_dim)
    start = _start(key_dim, value_dim, bf16)

    def unit(a: Any, row: Any, kv_head: Any) -> None:
        group_size, slots = a.heads // a.kv_heads, one_query.slots_of(a, row)
        queries = a.scratch + np.int64(thread()) * a.scratch_size
        states = queries + group_size * keys * 4
        s, s_row = states + group_size * state_bytes, np.int64(4 * (a.block_keys + TILE))
        tile = s + group_size * s_row
        key_list = tile + keys * TILE_BYTES
        value_list = key_list + 8 * (a.block_keys + TILE)
        key_copies = value_list + 8 * (a.block_keys + TILE)
        value_copies = key_copies + a.block_keys * keys * 4
        head = kv_head * group_size
        start(a, row, head, queries, states)
        end = np.int64(int32s(a.kv_len)[row])
        low = one_query.first_key(a, end - 1)
        while low < end:
            high = min(end, (low // a.block_keys + 1) * a.block_keys)
            n = high - low
            for first in range(0, n, TILE):
                count, here = min(np.int64(TILE), n - first), int32s(slots + (low + first) * 4)
                find_keys(a.keys, here, count, a.kv_heads * key_row, kv_head * key_row, key_list, key_copies)
                fetch_values(a.values, here, count, a.kv_heads, kv_head)  # read when all scores are there
                transpose(key_list, (count + LANES - 1) // LANES, tile)
                score(queries, tile, s + first * 4, s_row, group_size)
            here = int32s(slots + low * 4)
            find_values(a.values, here, n, a.kv_heads * value_row, kv_head * value_row, value_list, value_copies)
            fetch_keys(a.keys, int32s(slots + high * 4), min(np.int64(TILE), end - high), a.kv_heads, kv_head)
            for h in range(group_size):
                add_block(a, s + h * s_row, n, value_list, states + h * state_bytes)
            low = high
        token = np.int64(int32s(a.q_start)[row])
        for h in range(group_size):
            total = states + h * state_bytes
            state = float32s(total + values * 4)
            one_query.normalize(a, token, head + h, total, value_dim, bf16, state[0], state[LANES])

    return njit(**OPTIONS)(unit)


def for_each_head(unit: Any) -> Any:
    """The body of a kernel: ``unit(a, row, kv_head)`` for all rows and KV heads, which its threads claim."""

    def body(a: Any) -> None:
        units = a.decodes * a.kv_heads
        grain = max(np.int64(1), units // (np.int64(threads()) * 32))  # units that a thread claims at a time
        claimed = claim(a, grain)
        while claimed < units:
            for u in range(claimed, min(claimed + grain, units)):
                unit(a, np.int64(int32s(a.row_ids)[u // a.kv_heads]), u % a.kv_heads)
            claimed = claim(a, grain)

    return body


@cache
def kernel(key_dim: int, value_dim: int, bf16: bool, int8: bool = False) -> Kernel:
    """The compiled kernel for these widths, in float32, or in bfloat16 if ``bf16``; the pool is int8 if ``int8``."""
    return Kernel(for_each_head(_unit(key_dim, value_dim, bf16, int8)), Arguments)
