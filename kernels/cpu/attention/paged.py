"""The ``cpu`` backend's attention for rows with one query: reads each cached byte once.

Keys and values are read straight from the pool, a block at a time, and all heads of the query
use the block while it is in the cache. The keys of all rows are divided evenly over the
threads, so a long row is shared by several of them: each leaves its part of the softmax (sums
over values, largest score, sum of weights) and a second, short task merges the parts.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
from numba import njit

from trunkline.kernels.cpu.exponential import LOG2E
from trunkline.kernels.cpu.threads import OPTIONS, Task, float32s, int32s, int64s, thread, threads
from trunkline.kernels.cpu.vectors import BYTES, LANES

from .flash_tiles import LOWEST, cap, move
from .paged_blocks import accumulate, prefetch, scores, weigh

BLOCK = 32  # keys; a block of one head's keys and values stays in the L1 cache


class Arguments:
    """What the loop gets: addresses, sizes, strides in elements."""

    q: int
    q_token: int
    q_head: int
    keys: int
    values: int
    out: int
    scratch: int
    sinks: int  # 0: none
    table: int
    max_len: int
    table_row: int
    q_start: int
    kv_len: int
    which: int  # rows, int32
    rows: int
    heads: int
    groups: int  # heads of keys and values
    window: int  # 0: any
    chunk: int  # 0: any
    shares: int  # of the work; negative: put the shares' results together
    scale: float
    softcap: float


# numba freezes globals; typed ones keep float32 arithmetic from widening.
_ONE, _ZERO, _LOWEST, _LN2 = np.float32(1.0), np.float32(0.0), np.float32(LOWEST), np.float32(math.log(2))

widen, copy, narrow = move(True, False), move(False, False), move(False, True)
padded = njit(**OPTIONS)(lambda width: (width + LANES - 1) // LANES * LANES)


def _first_key(a: Any, position: int) -> Any:
    first = np.int64(0)
    if a.window > 0:
        first = max(first, position + 1 - a.window)
    if a.chunk > 0:
        first = max(first, position // a.chunk * a.chunk)
    return first


first_key = njit(**OPTIONS)(_first_key)


def _span(a: Any, i: int) -> Any:
    """Of the ``i``-th row: its number, the first key that its query sees, and how many keys it has."""
    row = int32s(a.which)[i]
    length = np.int64(int32s(a.kv_len)[row])
    return row, first_key(a, length - 1), length


span = njit(**OPTIONS)(_span)


def _slots_of(a: Any, row: int) -> Any:
    """Where a row's slots stand in the table."""
    return a.table + np.int64(int32s(a.table_row)[row]) * a.max_len * 4


slots_of = njit(**OPTIONS)(_slots_of)


def _locate(
    pool: int, slots: Any, n: int, ahead: Any, more: int, stride: int, offset: int, width: int, half: bool, wide: int
) -> None:
    """Put the addresses of one head's vectors at ``wide``: ``n``, and the last again up to a multiple of LANES.

    A bfloat16 block, or one whose vectors aren't whole numbers of LANES wide, is first copied as
    float32 into the scratch behind the addresses, where the vectors' rest is zero. The vectors in
    the ``more`` slots of ``ahead``, which come next, are called for.
    """
    where, line, number = int64s(wide), padded(width) * 4, 2 if half else 4
    for j in range(more):
        prefetch(pool + (np.int64(ahead[j]) * stride + offset) * number, np.int64(width * number))
    for j in range(n):
        source = pool + (np.int64(slots[j]) * stride + offset) * number
        if half or width % LANES != 0:
            where[j] = wide + 8 * (BLOCK + LANES) + j * line
            if half:
                widen(source, where[j], width, _ONE)
            else:
                copy(source, where[j], width, _ONE)
            vector = float32s(where[j])
            for d in range(width, padded(width)):
                vector[d] = _ZERO
        else:
            where[j] = source
    for j in range(n, n + LANES):
        where[j] = where[n - 1]


locate = njit(**OPTIONS)(_locate)


def _load_query(a: Any, token: int, head: int, width: int, half: bool, address: int) -> None:
    """Copy one query head to ``address`` as float32, scaled so that scores are exponents of 2 (or tanh's argument)."""
    offset, query = token * a.q_token + head * a.q_head, float32s(address)
    factor = np.float32(a.scale / a.softcap if a.softcap > 0 else a.scale * LOG2E)
    if half:
        widen(a.q + offset * 2, address, width, factor)
    else:
        copy(a.q + offset * 4, address, width, factor)
    for d in range(width, padded(width)):
        query[d] = _ZERO


load_query = njit(**OPTIONS)(_load_query)


def _store(a: Any, token: int, head: int, address: int, width: int, half: bool) -> None:
    """Write one query head's output: the sum over values divided by the sum of weights."""
    state = float32s(address + padded(width) * 4)
    scale, weight = _ONE, _ZERO
    for i in range(LANES):
        weight += state[LANES + i]
    if a.sinks != 0:  # one more column of the softmax, without a value
        sink = float32s(a.sinks)[head] * LOG2E
        top = max(state[0], sink)
        scale = np.float32(math.exp((state[0] - top) * _LN2))
        weight = weight * scale + np.float32(math.exp((sink - top) * _LN2))
    offset = (token * a.heads + head) * width
    if half:
        narrow(address, a.out + offset * 2, width, scale / weight)
    else:
        copy(address, a.out + offset * 4, width, scale / weight)


store = njit(**OPTIONS)(_store)


def scratch_bytes(heads: int, key_dim: int, value_dim: int) -> int:
    """Scratch of one share: three states, a query, a block of keys and of values with addresses, scores."""
    keys, values = -(-key_dim // LANES) * LANES, -(-value_dim // LANES) * LANES
    lists = (BLOCK + LANES) * (8 + 8 + 4)
    return 4 * (3 * heads * (values + 3 * LANES) + heads * keys + BLOCK * (keys + values)) + lists + 64


scratch_of = njit(**OPTIONS)(scratch_bytes)


def _update(keys: int, values: int) -> Any:
    """One block of one query head: online softmax. Widths are whole numbers of LANES."""
    score, add = scores(keys), accumulate(values)

    def update(softcap: Any, query: int, k: int, v: int, n: int, s: int, total: int) -> None:
        groups, state = (n + LANES - 1) // LANES, total + values * 4
        score(query, k, groups, s)
        if softcap > _ZERO:
            cap(s, (groups + 1) // 2, softcap * LOG2E)
        rest = float32s(s)
        for j in range(n, groups * LANES):
            rest[j] = -np.inf
        weigh(s, groups, state)
        add(total, v, n, s, state + 2 * BYTES)

    return njit(**OPTIONS)(update)


@cache
def _segment(key_dim: int, value_dim: int, half: bool) -> Any:
    """Attention of one row's query over its keys [begin, end).

    ``state`` [heads, values + 3 * LANES], of widths filled up to LANES: sums over values, then what
    :func:`.weigh` keeps.
    """
    keys, values = -(-key_dim // LANES) * LANES, -(-value_dim // LANES) * LANES
    update, size = _update(keys, values), 4 * (values + 3 * LANES)

    def segment(a: Any, row: int, begin: int, end: int, follow: int, count: int, state: int, work: int) -> None:
        """``follow`` is the address of the first ``count`` slots that this thread reads after these."""
        token, per_group = np.int64(int32s(a.q_start)[row]), a.heads // a.groups
        for e in range(a.heads):
            load_query(a, token, e, key_dim, half, work + e * keys * 4)
            total = float32s(state + e * size)
            for d in range(values + 2 * LANES):
                total[d] = _ZERO
            for d in range(values, values + LANES):
                total[d] = _LOWEST
        s = work + a.heads * keys * 4
        k = s + 4 * (BLOCK + LANES)
        v = k + 8 * (BLOCK + LANES) + BLOCK * keys * 4
        line = slots_of(a, row)
        for block in range(begin, end, BLOCK):
            n = min(BLOCK, end - block)
            slots, ahead, more = int32s(line + block * 4), int32s(follow), count
            if block + BLOCK < end:
                ahead, more = int32s(line + (block + BLOCK) * 4), min(BLOCK, end - block - BLOCK)
            for group in range(a.groups):
                locate(a.keys, slots, n, ahead, more, a.groups * key_dim, group * key_dim, key_dim, half, k)
                locate(a.values, slots, n, ahead, more, a.groups * value_dim, group * value_dim, value_dim, half, v)
                for e in range(group * per_group, (group + 1) * per_group):
                    update(np.float32(a.softcap), work + e * keys * 4, k, v, n, s, state + e * size)

    return njit(**OPTIONS)(segment)


@cache
def task(key_dim: int, value_dim: int, half: bool) -> Task:
    """The compiled attention for these widths in float32 (``half``: bfloat16).

    A share of the work is a run of segments: perhaps the end of a row (kind 0), whole rows
    (kind 2), perhaps the beginning of another (kind 1). Run with ``shares`` > 0 it attends; run
    with ``-shares`` on one thread afterwards, it joins each kind 1 with the kinds 0 that follow.
    """
    values = -(-value_dim // LANES) * LANES
    segment, width = _segment(key_dim, value_dim, half), values + 3 * LANES

    def finish(a: Any, row: int, state: Any) -> None:
        token = np.int64(int32s(a.q_start)[row])
        for e in range(a.heads):
            store(a, token, e, state + e * width * 4, value_dim, half)

    def join(total: Any, piece: Any, heads: int) -> None:
        """Fold a later piece of the softmaxes into the earlier ones."""
        for e in range(heads):
            x, y = float32s(total + e * width * 4), float32s(piece + e * width * 4)
            top = max(x[values], y[values])
            old, new = np.float32(math.exp((x[values] - top) * _LN2)), np.float32(math.exp((y[values] - top) * _LN2))
            for d in range(width):
                x[d] = x[d] * old + y[d] * new
            for d in range(values, values + LANES):
                x[d] = top

    finish, join = njit(**OPTIONS)(finish), njit(**OPTIONS)(join)

    def body(a: Any) -> None:
        merge, shares = a.shares < 0, abs(a.shares)
        keys, total = np.int64(0), np.int64(0)
        for i in range(a.rows):
            _, low, high = span(a, i)
            keys += high - low
        size = scratch_of(a.heads, key_dim, value_dim)
        for share in range(0 if merge else thread(), shares, 1 if merge else threads()):
            begin, end, base = keys * share // shares, keys * (share + 1) // shares, np.int64(0)
            for i in range(a.rows):
                row, low, high = span(a, i)
                first = low + min(max(begin - base, 0), high - low)
                last = low + min(max(end - base, 0), high - low)
                base += high - low
                if first >= last:
                    continue
                kind = 0 if first > low else (1 if last < high else 2)
                state = a.scratch + share * size + kind * a.heads * width * 4
                if not merge:
                    work = a.scratch + share * size + 3 * a.heads * width * 4
                    follow, count = a.table, np.int64(0)
                    if i + 1 < a.rows:
                        after, low_after, high_after = span(a, i + 1)
                        follow = slots_of(a, after) + low_after * 4
                        count = min(np.int64(BLOCK), high_after - low_after)
                    segment(a, row, first, last, follow, count, state, work)
                    if kind == 2:
                        finish(a, row, state)
                elif kind == 1:
                    total = state
                elif kind == 0:
                    join(total, state, a.heads)
                    if last == high:
                        finish(a, row, total)

    return Task(body, Arguments)
