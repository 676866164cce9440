"""The ``cpu`` backend's attention for rows with few queries: reads each cached byte once.

Keys and values are read straight from the pool, a block at a time, and all heads of all queries
of the row use the block while it is in the cache. The keys of all rows are divided evenly over the
threads, so a long row is shared by several of them: each leaves its part of the softmax
(accumulator, largest score, sum of weights) and a second, short task merges the parts.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numba import njit

from .layout import Layout
from .threads import OPTIONS, Task, float32s, int32s, int64s, team_size, threads, uint16s
from .threads import thread as thread_number

BLOCK = 32  # keys; a block of one head's keys and values stays in the L1 cache
_SERIAL = 1 << 15  # keys times queries times heads under which waking other threads costs more
_LOOPS: dict[str, Any] = {"fastmath": {"reassoc", "contract", "nsz", "arcp", "afn"}, **OPTIONS}  # NaN stays NaN

_ARGUMENTS = [
    *((name, np.int64) for name in ("q", "q_token", "q_head", "keys", "values", "out", "states", "sinks")),
    *((name, np.int64) for name in ("table", "max_len", "table_row", "q_start", "kv_len", "which", "rows")),
    *((name, np.int64) for name in ("heads", "groups", "most", "window", "chunk", "shares")),
    *((name, np.float64) for name in ("scale", "softcap")),
]

# numba freezes globals; typed ones keep float32 arithmetic from widening.
_LOG2E, _HALF, _LEAST = np.float32(1.4426950408889634), np.float32(0.5), np.float32(-126.0)
_E1, _E2, _E3 = np.float32(0.6931471805599453), np.float32(0.2402265069591007), np.float32(0.05550410866482158)
_E4, _E5 = np.float32(0.009618129107628477), np.float32(0.0013333558146428443)
_E6 = np.float32(0.0001540353039338161)
_ONE, _ZERO, _LOWEST = np.float32(1.0), np.float32(0.0), np.float32(-3.0e38)


def _exponentials(x: Any, power: Any, n: int, shift: Any) -> None:
    """``x[:n] = exp(x[:n] - shift)`` for results of at most 1; ``power`` is int32 scratch.

    2**t = 2**round(t) * 2**rest: a polynomial, and an exponent written as bits. Calls to libm
    wouldn't vectorise.
    """
    for i in range(n):
        t = max((x[i] - shift) * _LOG2E, _LEAST)
        whole = np.floor(t + _HALF)
        f = t - whole
        x[i] = _ONE + f * (_E1 + f * (_E2 + f * (_E3 + f * (_E4 + f * (_E5 + f * _E6)))))
        power[i] = (np.int32(whole) + np.int32(127)) << np.int32(23)
    factor = power.view(np.float32)
    for i in range(n):
        x[i] *= factor[i]


exponentials = njit(**_LOOPS)(_exponentials)


def _visible(a: Any, row: int) -> Any:
    """Queries of a row, the first key that its first query sees, and its number of keys."""
    start = int32s(a.q_start, row + 2)
    queries = np.int64(start[row + 1]) - np.int64(start[row])
    length = np.int64(int32s(a.kv_len, row + 1)[row])
    return queries, first_key(a, length - queries), length


def _first_key(a: Any, position: int) -> int:
    first = np.int64(0)
    if a.window > 0:
        first = max(first, position + 1 - a.window)
    if a.chunk > 0:
        first = max(first, position // a.chunk * a.chunk)
    return first


first_key = njit(**OPTIONS)(_first_key)
visible = njit(**OPTIONS)(_visible)


def _total(a: Any) -> int:
    """Work of all rows, in query-key pairs."""
    total = np.int64(0)
    which = int32s(a.which, a.rows)
    for i in range(a.rows):
        queries, low, high = visible(a, which[i])
        total += queries * (high - low)
    return total


total_work = njit(**OPTIONS)(_total)


def _cut(base: int, begin: int, end: int, queries: int, low: int, high: int) -> Any:
    """The keys [a, b) of a row that fall into the share [begin, end) of all work; the row's starts at base."""
    work = queries * (high - low)
    a = low if begin <= base else low + min(begin - base, work) // queries
    b = high if end >= base + work else low + max(end - base, 0) // queries
    return a, b


cut = njit(**OPTIONS)(_cut)


@lru_cache(maxsize=None)
def _inner_loops(key_dim: int, value_dim: int) -> tuple[Any, Any]:
    """Scores of a block of keys, and the weighted sum of its values.

    The head dims are constants of the compiled code. Four keys at a time: the query (the sum) is
    loaded once for them, and no sum over lanes stands between two multiplications.
    """

    def scores(query: Any, where: Any, n: int, result: Any) -> Any:
        """``result[:n] = query · key``; returns the largest."""
        largest = _LOWEST
        for j in range(0, n - 3, 4):
            k0, k1 = float32s(where[j], key_dim), float32s(where[j + 1], key_dim)
            k2, k3 = float32s(where[j + 2], key_dim), float32s(where[j + 3], key_dim)
            s0, s1, s2, s3 = _ZERO, _ZERO, _ZERO, _ZERO
            for d in range(key_dim):
                s0 += query[d] * k0[d]
                s1 += query[d] * k1[d]
                s2 += query[d] * k2[d]
                s3 += query[d] * k3[d]
            result[j], result[j + 1], result[j + 2], result[j + 3] = s0, s1, s2, s3
            largest = max(largest, max(max(s0, s1), max(s2, s3)))
        for j in range(n - n % 4, n):
            key = float32s(where[j], key_dim)
            s0 = _ZERO
            for d in range(key_dim):
                s0 += query[d] * key[d]
            result[j] = s0
            largest = max(largest, s0)
        return largest

    def accumulate(total: Any, where: Any, n: int, weights: Any) -> None:
        """``total += weights[j] * value j`` over the block."""
        for j in range(0, n - 3, 4):
            v0, v1 = float32s(where[j], value_dim), float32s(where[j + 1], value_dim)
            v2, v3 = float32s(where[j + 2], value_dim), float32s(where[j + 3], value_dim)
            w0, w1, w2, w3 = weights[j], weights[j + 1], weights[j + 2], weights[j + 3]
            for d in range(value_dim):
                total[d] += (w0 * v0[d] + w1 * v1[d]) + (w2 * v2[d] + w3 * v3[d])
        for j in range(n - n % 4, n):
            value = float32s(where[j], value_dim)
            for d in range(value_dim):
                total[d] += weights[j] * value[d]

    return njit(**_LOOPS)(scores), njit(**_LOOPS)(accumulate)


def _locate(pool: int, slots: Any, n: int, width: int, groups: int, group: int, wide: Any, where: Any) -> None:
    """``where[j]`` = address of one head's vector in slot j; float32 pools are read in place."""
    for j in range(n):
        where[j] = pool + (np.int64(slots[j]) * groups + group) * width * 4


def _widen(pool: int, slots: Any, n: int, width: int, groups: int, group: int, wide: Any, where: Any) -> None:
    """The same for bfloat16 pools: the block is first converted to float32, into ``wide``."""
    base = np.int64(wide.ctypes.data)
    bits = wide.view(np.uint32)
    for j in range(n):
        source = uint16s(pool + (np.int64(slots[j]) * groups + group) * width * 2, width)
        offset = j * width
        for d in range(width):
            bits[offset + d] = np.uint32(source[d]) << np.uint32(16)
        where[j] = base + offset * 4


locate = njit(**_LOOPS)(_locate)
widen = njit(**_LOOPS)(_widen)
