"""The ``cpu`` backend's attention for rows with one query: reads each cached key and value once.

Keys and values are read directly from the KV pool, block by block. All query heads that share a KV head
use the block while it is in L1: with head width 64 in float32, 32 keys and 32 values are 16 KiB.

The keys of all rows are divided evenly over the threads, so several threads may share a long row. Each
stores its partial result (sums over values, largest score, sum of weights), and a second, short run
on one thread merges the partial results (split-KV, as in Flash-Decoding).
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
from numba import njit

from trunkline.kernels.cpu.exponential import LOG2E
from trunkline.kernels.cpu.quantized import cache as int8_cache
from trunkline.kernels.cpu.threads import OPTIONS, Kernel, float32s, int32s, int64s, thread, threads
from trunkline.kernels.cpu.vectors import BYTES, LANES
from trunkline.kernels.quantized.cache import stored_width

from . import one_query
from .flash_tiles import LOWEST, apply_softcap
from .one_query import copy, first_key, load_query, normalize, padded, slots_of, widen
from .paged_blocks import accumulate, prefetch, scores, softmax

BLOCK = 32  # keys of a block


class Arguments(one_query.Arguments):
    """The kernel's arguments."""

    shares: int  # into which the work is divided; negative: merge the partial results of that many shares


# numba compiles globals in as constants. Typed ones: a Python float would widen the arithmetic to float64.
_ZERO, _LOWEST, _LN2 = np.float32(0.0), np.float32(LOWEST), np.float32(math.log(2))


def _span(a: Any, i: int) -> Any:
    """The number of the ``i``-th row, the first key that its query sees, and the end of its keys."""
    row = int32s(a.row_ids)[i]
    length = np.int64(int32s(a.kv_len)[row])
    return row, first_key(a, length - 1), length


span = njit(**OPTIONS)(_span)


def _gather(
    pool: int, slots: Any, n: int, ahead: Any, more: int, stride: int, offset: int, width: int, bf16: bool, block: int
) -> None:
    """Write the addresses of ``n`` keys or values of one head to ``block``; the last is repeated up to LANES.

    Float32 vectors whose width is a multiple of LANES are used where they are in the pool. Others are
    first copied to the scratch memory after the addresses, as float32, padded with zeros. Prefetches the
    vectors in the ``more`` slots of ``ahead``, which come next: between the copies, if there are any, since
    all at once they would wait for the processor's few buffers.
    """
    where, vector_bytes, number = int64s(block), padded(width) * 4, 2 if bf16 else 4
    copies, size = bf16 or width % LANES != 0, np.int64(width * number)
    at_once = 0 if copies else more
    for j in range(at_once):
        prefetch(pool + (np.int64(ahead[j]) * stride + offset) * number, size)
    for j in range(n):
        source = pool + (np.int64(slots[j]) * stride + offset) * number
        if copies:
            if j < more:
                prefetch(pool + (np.int64(ahead[j]) * stride + offset) * number, size)
            where[j] = block + 8 * (BLOCK + LANES) + j * vector_bytes
            if bf16:
                widen(source, where[j], width, np.float32(1))
            else:
                copy(source, where[j], width, np.float32(1))
            vector = float32s(where[j])
            for d in range(width, padded(width)):
                vector[d] = _ZERO
        else:
            where[j] = source
    for j in range(max(n, at_once), more):
        prefetch(pool + (np.int64(ahead[j]) * stride + offset) * number, size)
    for j in range(n, n + LANES):
        where[j] = where[n - 1]


def _gather_int8(
    pool: int, slots: Any, n: int, ahead: Any, more: int, stride: int, offset: int, width: int, _: bool, block: int
) -> None:
    """:func:`_gather` for an int8 pool; ``stride`` and ``offset`` are in bytes."""
    where, vector_bytes, row = int64s(block), padded(width) * 4, int8_cache.row_bytes(np.int64(width))
    for j in range(n):
        if j < more:
            prefetch(pool + np.int64(ahead[j]) * stride + offset, row)
        where[j] = block + 8 * (BLOCK + LANES) + j * vector_bytes
        int8_cache.load(pool + np.int64(slots[j]) * stride + offset, where[j], width, np.float32(1))
        vector = float32s(where[j])
        for d in range(width, padded(width)):
            vector[d] = _ZERO
    for j in range(n, more):
        prefetch(pool + np.int64(ahead[j]) * stride + offset, row)
    for j in range(n, n + LANES):
        where[j] = where[n - 1]


float_gather, int8_gather = njit(**OPTIONS)(_gather), njit(**OPTIONS)(_gather_int8)


def _store(a: Any, token: int, head: int, address: int, width: int, bf16: bool) -> None:
    """Write one query head's output, from the sums over values and the state of :func:`.softmax` after them."""
    state = float32s(address + padded(width) * 4)
    weight = _ZERO
    for i in range(LANES):
        weight += state[LANES + i]
    normalize(a, token, head, address, width, bf16, state[0], weight)


store = njit(**OPTIONS)(_store)


def scratch_bytes(heads: int, key_dim: int, value_dim: int) -> int:
    """Scratch bytes of one share: three states, queries, a block of keys and values, their addresses, scores."""
    keys, values = -(-key_dim // LANES) * LANES, -(-value_dim // LANES) * LANES
    lists = (BLOCK + LANES) * (8 + 8 + 4)
    return 4 * (3 * heads * (values + 3 * LANES) + heads * keys + BLOCK * (keys + values)) + lists + 64


scratch_of = njit(**OPTIONS)(scratch_bytes)


def _update(keys: int, values: int) -> Any:
    """Attention of one query head over one block, with online softmax; widths are multiples of LANES."""
    score, add = scores(keys), accumulate(values)

    def update(softcap: Any, query: int, k: int, v: int, n: int, s: int, total: int) -> None:
        vectors, state = (n + LANES - 1) // LANES, total + values * 4
        score(query, k, vectors, s)
        if softcap > _ZERO:
            apply_softcap(s, (vectors + 1) // 2, softcap * LOG2E)
        rest = float32s(s)
        for j in range(n, vectors * LANES):
            rest[j] = -np.inf
        softmax(s, vectors, state)
        add(total, v, n, s, state + 2 * BYTES)

    return njit(**OPTIONS)(update)


@cache
def _segment(key_dim: int, value_dim: int, bf16: bool, int8: bool) -> Any:
    """Compiled attention of one row's query over its keys ``[begin, end)``.

    The result is in ``state`` [heads, values + 3 * LANES] float32: sums over values, padded to LANES, then
    the state of :func:`.softmax`.
    """
    keys, values = -(-key_dim // LANES) * LANES, -(-value_dim // LANES) * LANES
    update, size = _update(keys, values), 4 * (values + 3 * LANES)
    gather = int8_gather if int8 else float_gather
    key_row, value_row = (stored_width(width) if int8 else width for width in (key_dim, value_dim))

    def segment(a: Any, row: int, begin: int, end: int, follow: int, count: int, state: int, work: int) -> None:
        """``follow``: address of the next ``count`` slots that this thread will read, which are prefetched."""
        token, group_size = np.int64(int32s(a.q_start)[row]), a.heads // a.kv_heads
        for e in range(a.heads):
            load_query(a, token, e, key_dim, bf16, work + e * keys * 4)
            total = float32s(state + e * size)
            for d in range(values + 2 * LANES):
                total[d] = _ZERO
            for d in range(values, values + LANES):
                total[d] = _LOWEST
        s = work + a.heads * keys * 4
        k = s + 4 * (BLOCK + LANES)
        v = k + 8 * (BLOCK + LANES) + BLOCK * keys * 4
        row_slots = slots_of(a, row)
        for block in range(begin, end, BLOCK):
            n = min(BLOCK, end - block)
            slots, ahead, more = int32s(row_slots + block * 4), int32s(follow), count
            if block + BLOCK < end:
                ahead, more = int32s(row_slots + (block + BLOCK) * 4), min(BLOCK, end - block - BLOCK)
            for kv_head in range(a.kv_heads):
                gather(a.keys, slots, n, ahead, more, a.kv_heads * key_row, kv_head * key_row, key_dim, bf16, k)
                gather(a.values, slots, n, ahead, more, a.kv_heads * value_row, kv_head * value_row, value_dim, bf16, v)
                for e in range(kv_head * group_size, (kv_head + 1) * group_size):
                    update(np.float32(a.softcap), work + e * keys * 4, k, v, n, s, state + e * size)

    return njit(**OPTIONS)(segment)


@cache
def kernel(key_dim: int, value_dim: int, bf16: bool, int8: bool = False) -> Kernel:
    """The compiled kernel for these widths, in float32, or in bfloat16 if ``bf16``; the pool is int8 if ``int8``.

    A share of the work is a sequence of segments::

        keys of all rows   | row 0              | row 1   | row 2                          |
        shares             | share 0       | share 1               | share 2               |
        segments           | 1             | 0  | 2       | 1      | 0                     |

    Kind 1 is the beginning of a row, kind 0 what comes after a beginning in another share (up to the row's
    end, or the whole share), and kind 2 a whole row. Run with ``shares`` > 0, the kernel computes all
    segments and writes the results of kind 2. Run again with ``-shares``, on one thread, it merges each
    segment of kind 1 with those of kind 0 that follow, and writes the results.
    """
    values = -(-value_dim // LANES) * LANES
    segment, width = _segment(key_dim, value_dim, bf16, int8), values + 3 * LANES

    def finish(a: Any, row: int, state: Any) -> None:
        token = np.int64(int32s(a.q_start)[row])
        for e in range(a.heads):
            store(a, token, e, state + e * width * 4, value_dim, bf16)

    def join(total: Any, piece: Any, heads: int) -> None:
        """Merge the state of a later segment into that of the earlier ones."""
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
        for i in range(a.decodes):
            _, low, high = span(a, i)
            keys += high - low
        size = scratch_of(a.heads, key_dim, value_dim)
        for share in range(0 if merge else thread(), shares, 1 if merge else threads()):
            begin, end, base = keys * share // shares, keys * (share + 1) // shares, np.int64(0)
            for i in range(a.decodes):
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
                    if i + 1 < a.decodes:
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

    return Kernel(body, Arguments)
