"""The ``cpu`` backend's attention for rows with few queries: reads each cached byte once.

Keys and values are read straight from the pool, a block at a time, and all heads of all queries
of the row use the block while it is in the cache. The keys of all rows are divided evenly over the
threads, so a long row is shared by several of them: each leaves its part of the softmax (sums
over values, largest score, sum of weights) and a second, short task merges the parts.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
from numba import njit

from .exponential import exponentials
from .threads import OPTIONS, Task, float32s, int32s, int64s, thread, threads, uint16s, uint32s

BLOCK = 32  # keys; a block of one head's keys and values stays in the L1 cache
_LOOPS: dict[str, Any] = {"fastmath": {"reassoc", "contract", "nsz", "arcp", "afn"}, **OPTIONS}  # NaN stays NaN

ARGUMENTS = [
    *((name, np.int64) for name in ("q", "q_token", "q_head", "keys", "values", "out", "scratch", "sinks")),
    *((name, np.int64) for name in ("table", "max_len", "table_row", "q_start", "kv_len", "which", "rows")),
    *((name, np.int64) for name in ("heads", "groups", "most", "window", "chunk", "shares")),
    *((name, np.float64) for name in ("scale", "softcap")),
]

# numba freezes globals; typed ones keep float32 arithmetic from widening.
_ONE, _ZERO, _LOWEST = np.float32(1.0), np.float32(0.0), np.float32(-3.0e38)


def _first_key(a: Any, position: int) -> Any:
    first = np.int64(0)
    if a.window > 0:
        first = max(first, position + 1 - a.window)
    if a.chunk > 0:
        first = max(first, position // a.chunk * a.chunk)
    return first


first_key = njit(**OPTIONS)(_first_key)


def _span(a: Any, i: int) -> Any:
    """Of the ``i``-th row: its number, its queries, the first key that any of them sees, its keys."""
    row = int32s(a.which)[i]
    start = int32s(a.q_start)
    queries = np.int64(start[row + 1]) - np.int64(start[row])
    length = np.int64(int32s(a.kv_len)[row])
    return row, queries, first_key(a, length - queries), length


span = njit(**OPTIONS)(_span)


@cache
def _block_loops(key_dim: int, value_dim: int) -> tuple[Any, Any]:
    """Scores of a block of keys, and the weighted sum of its values.

    The widths are constants of the compiled code. Four keys at a time: the query (the sum) is
    loaded once for them, and their additions don't wait for each other.
    """

    def scores(query: Any, where: Any, n: int, result: Any) -> Any:
        """``result[:n] = query · key``; returns the largest."""
        largest, whole = _LOWEST, n - n % 4
        for j in range(0, whole, 4):
            k0, k1, k2, k3 = float32s(where[j]), float32s(where[j + 1]), float32s(where[j + 2]), float32s(where[j + 3])
            s0, s1, s2, s3 = _ZERO, _ZERO, _ZERO, _ZERO
            for d in range(key_dim):
                s0 += query[d] * k0[d]
                s1 += query[d] * k1[d]
                s2 += query[d] * k2[d]
                s3 += query[d] * k3[d]
            result[j], result[j + 1], result[j + 2], result[j + 3] = s0, s1, s2, s3
            largest = max(largest, max(max(s0, s1), max(s2, s3)))
        for j in range(whole, n):
            k0, s0 = float32s(where[j]), _ZERO
            for d in range(key_dim):
                s0 += query[d] * k0[d]
            result[j] = s0
            largest = max(largest, s0)
        return largest

    def accumulate(total: Any, where: Any, n: int, w: Any) -> None:
        """``total += w[j] * value j`` over the block."""
        whole = n - n % 4
        for j in range(0, whole, 4):
            v0, v1, v2, v3 = float32s(where[j]), float32s(where[j + 1]), float32s(where[j + 2]), float32s(where[j + 3])
            w0, w1, w2, w3 = w[j], w[j + 1], w[j + 2], w[j + 3]
            for d in range(value_dim):
                total[d] += (w0 * v0[d] + w1 * v1[d]) + (w2 * v2[d] + w3 * v3[d])
        for j in range(whole, n):
            v0, w0 = float32s(where[j]), w[j]
            for d in range(value_dim):
                total[d] += w0 * v0[d]

    return njit(**_LOOPS)(scores), njit(**_LOOPS)(accumulate)


def _locate(pool: int, slots: Any, n: int, stride: int, offset: int, width: int, half: bool, wide: int) -> None:
    """Put the addresses of one head's vectors in ``slots[:n]`` at ``wide``.

    A bfloat16 block is first converted to float32, into the scratch behind the addresses.
    """
    where = int64s(wide)
    for j in range(n):
        source = pool + (np.int64(slots[j]) * stride + offset) * (2 if half else 4)
        if half:
            where[j] = wide + 8 * BLOCK + j * width * 4
            narrow, bits = uint16s(source), uint32s(where[j])
            for d in range(width):
                bits[d] = np.uint32(narrow[d]) << np.uint32(16)
        else:
            where[j] = source


locate = njit(**_LOOPS)(_locate)


def _load_query(a: Any, token: int, head: int, width: int, half: bool, address: int) -> None:
    """Copy one query head to ``address``, scaled, as float32."""
    offset, scale, query = token * a.q_token + head * a.q_head, np.float32(a.scale), float32s(address)
    if half:
        narrow, bits = uint16s(a.q + offset * 2), uint32s(address)
        for d in range(width):
            bits[d] = np.uint32(narrow[d]) << np.uint32(16)
        for d in range(width):
            query[d] *= scale
    else:
        source = float32s(a.q + offset * 4)
        for d in range(width):
            query[d] = source[d] * scale


load_query = njit(**_LOOPS)(_load_query)


def _store(a: Any, token: int, head: int, address: int, width: int, half: bool) -> None:
    """Write one query head's output: the sum over values divided by the sum of weights."""
    total = float32s(address)
    scale, weight = _ONE, total[width + 1]
    if a.sinks != 0:  # one more column of the softmax, without a value
        sink = float32s(a.sinks)[head]
        top = max(total[width], sink)
        scale = np.float32(math.exp(total[width] - top))
        weight = weight * scale + np.float32(math.exp(sink - top))
    scale = scale / weight
    offset = (token * a.heads + head) * width
    if half:
        for d in range(width):
            total[d] *= scale
        bits, narrow = uint32s(address), uint16s(a.out + offset * 2)
        for d in range(width):  # to nearest, ties to even
            narrow[d] = (bits[d] + np.uint32(0x7FFF) + ((bits[d] >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    else:
        result = float32s(a.out + offset * 4)
        for d in range(width):
            result[d] = total[d] * scale


store = njit(**_LOOPS)(_store)


def scratch_bytes(most: int, heads: int, key_dim: int, value_dim: int) -> int:
    """Scratch of one share: three states, queries, a block of keys and of values, scores."""
    cells = most * heads
    return 4 * (3 * cells * (value_dim + 2) + cells * key_dim + BLOCK * (key_dim + value_dim + 2)) + 16 * BLOCK + 64


scratch_of = njit(**OPTIONS)(scratch_bytes)


@cache
def _segment(key_dim: int, value_dim: int, half: bool) -> Any:
    """Attention of one row's queries over its keys [begin, end).

    ``state`` [queries * heads, value_dim + 2]: sums over values, largest score, sum of weights.
    """
    scores, accumulate = _block_loops(key_dim, value_dim)

    def update(cap: Any, query: int, k: int, v: int, n: int, work: int, state: int) -> None:
        """One block of one query head: online softmax."""
        s, total = float32s(work), float32s(state)
        largest = scores(float32s(query), int64s(k), n, s)
        if cap > _ZERO:
            largest = _LOWEST
            for j in range(n):
                s[j] = cap * np.float32(math.tanh(s[j] / cap))
                largest = max(largest, s[j])
        if largest > total[value_dim]:
            shrink = np.float32(math.exp(total[value_dim] - largest))
            total[value_dim] = largest
            total[value_dim + 1] *= shrink
            for d in range(value_dim):
                total[d] *= shrink
        total[value_dim + 1] += exponentials(s, work + 4 * BLOCK, n, total[value_dim])
        accumulate(total, int64s(v), n, s)

    update = njit(**_LOOPS)(update)

    def segment(a: Any, row: int, queries: int, length: int, begin: int, end: int, state: int, work: int) -> None:
        token, per_group, cells = np.int64(int32s(a.q_start)[row]), a.heads // a.groups, queries * a.heads
        for e in range(cells):
            load_query(a, token + e // a.heads, e % a.heads, key_dim, half, work + e * key_dim * 4)
            total = float32s(state + e * (value_dim + 2) * 4)
            for d in range(value_dim + 2):
                total[d] = _ZERO
            total[value_dim] = _LOWEST
        s = work + cells * key_dim * 4
        k = s + 8 * BLOCK
        v = k + BLOCK * (8 + key_dim * 4)
        line = a.table + np.int64(int32s(a.table_row)[row]) * a.max_len * 4
        for block in range(begin, end, BLOCK):
            n = min(BLOCK, end - block)
            slots = int32s(line + block * 4)
            for group in range(a.groups):
                locate(a.keys, slots, n, a.groups * key_dim, group * key_dim, key_dim, half, k)
                locate(a.values, slots, n, a.groups * value_dim, group * value_dim, value_dim, half, v)
                for i in range(queries):
                    position = length - queries + i
                    low, high = max(first_key(a, position) - block, 0), min(position + 1 - block, n)
                    if low < high:
                        for e in range(i * a.heads + group * per_group, i * a.heads + (group + 1) * per_group):
                            update(
                                np.float32(a.softcap), work + e * key_dim * 4, k + low * 8, v + low * 8,
                                high - low, s, state + e * (value_dim + 2) * 4,
                            )  # fmt: skip

    return njit(**_LOOPS)(segment)


@cache
def task(key_dim: int, value_dim: int, half: bool) -> Task:
    """The compiled attention for these widths in float32 (``half``: bfloat16).

    A share of the work is a run of segments: perhaps the end of a row (kind 0), whole rows
    (kind 2), perhaps the beginning of another (kind 1). Run with ``shares`` > 0 it attends; run
    with ``-shares`` on one thread afterwards, it joins each kind 1 with the kinds 0 that follow.
    """
    segment, width = _segment(key_dim, value_dim, half), value_dim + 2

    def finish(a: Any, row: int, cells: int, state: Any) -> None:
        token = np.int64(int32s(a.q_start)[row])
        for e in range(cells):
            store(a, token + e // a.heads, e % a.heads, state + e * width * 4, value_dim, half)

    def join(total: Any, piece: Any, cells: int) -> None:
        """Fold a later piece of the softmaxes into the earlier ones."""
        for e in range(cells):
            x, y = float32s(total + e * width * 4), float32s(piece + e * width * 4)
            top = max(x[value_dim], y[value_dim])
            old, new = np.float32(math.exp(x[value_dim] - top)), np.float32(math.exp(y[value_dim] - top))
            for d in range(width):
                x[d] = x[d] * old + y[d] * new
            x[value_dim] = top

    finish, join = njit(**_LOOPS)(finish), njit(**_LOOPS)(join)

    def body(a: Any) -> None:
        merge, shares = a.shares < 0, abs(a.shares)
        pairs, total, cells = np.int64(0), np.int64(0), a.most * a.heads
        for i in range(a.rows):
            _, queries, low, high = span(a, i)
            pairs += queries * (high - low)
        size = scratch_of(a.most, a.heads, key_dim, value_dim)
        for share in range(0 if merge else thread(), shares, 1 if merge else threads()):
            begin, end, base = pairs * share // shares, pairs * (share + 1) // shares, np.int64(0)
            for i in range(a.rows):
                row, queries, low, high = span(a, i)
                first = low + min(max(begin - base, 0) // queries, high - low)
                last = low + min(max(end - base, 0) // queries, high - low)
                base += queries * (high - low)
                if first >= last:
                    continue
                kind = 0 if first > low else (1 if last < high else 2)
                state = a.scratch + share * size + kind * cells * width * 4
                if not merge:
                    segment(a, row, queries, high, first, last, state, a.scratch + share * size + 3 * cells * width * 4)
                    if kind == 2:
                        finish(a, row, queries * a.heads, state)
                elif kind == 1:
                    total = state
                elif kind == 0:
                    join(total, state, queries * a.heads)
                    if last == high:
                        finish(a, row, queries * a.heads, total)

    return Task(body, ARGUMENTS, **_LOOPS)
