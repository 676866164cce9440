"""The ``cpu`` backend's attention for rows with many queries: one walk over the keys, no score kept.

Work is divided into units of one row, one head of keys and a block of queries, with all query
heads that share the keys. A query of one head is a *lane*; 16 lanes are a panel, and a panel's
queries, scores and sums lie transposed, ``[.., 16]``: every number of a key or value meets all
lanes at once, largest scores and sums of weights need nothing across lanes, and a panel reads
exactly the keys that one of its queries sees. Keys and values are copied a block at a time, from
the pool by slot or from the new tokens, and serve all panels of the unit.

Blocks of keys begin at multiples of their size, so that a query's result depends neither on the
queries beside it nor on the number of threads.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import torch
from numba import njit

from trunkline.kernels.cpu.exponential import LOG2E
from trunkline.kernels.cpu.threads import OPTIONS, Task, claim, float32s, int32s, thread
from trunkline.kernels.cpu.vectors import LANES

from . import flash_pairs
from .flash_arguments import Arguments
from .flash_tiles import BOUNDS, LOWEST, PANEL, ROW, SPARE, SUMS, cap, hide, move, softmax, tile, transpose
from .paged_blocks import prefetch

_ONE, _ZERO, _LOWEST, _LN2 = np.float32(1), np.float32(0), np.float32(LOWEST), np.float32(math.log(2))


_tile6, _tile4 = tile(6), tile(4)


def _product(a: Any, a_row: Any, a_step: Any, b: Any, n: Any, c: Any, rows: Any, factor: Any) -> None:
    """``rows`` rows, or up to three more, of the product that :func:`.tile` describes."""
    r = np.int64(0)
    while r < rows:
        left = rows - r
        if left > 4 and left != 7 and left != 8:
            _tile6(a + r * a_row, a_row, a_step, b, n, c + r * ROW, factor)
            r += 6
        else:
            _tile4(a + r * a_row, a_row, a_step, b, n, c + r * ROW, factor)
            r += 4


product = njit(**OPTIONS)(_product)


def _attend(a: Any, low: Any, high: Any, k_block: Any, v_block: Any, s: Any, panel: Any, _: Any) -> None:
    """One panel over the copied keys [low, high): scores, softmax so far, values."""
    first, end = int32s(panel + BOUNDS), int32s(panel + BOUNDS + ROW)
    begin, last = max(low, np.int64(first[0])), min(high, np.int64(end[PANEL - 1]))
    n = last - begin
    if n <= 0:
        return
    queries = panel + SUMS + (a.v_rows + SPARE) * ROW
    product(k_block + (begin - low) * a.k_line, a.k_line, np.int64(4), queries, a.key_dim, s, n, np.int64(0))
    if a.softcap > 0:
        cap(s, n, np.float32(a.softcap * LOG2E))
    # All lanes see the keys [first of the last lane, end of the first lane).
    part = begin if begin < np.int64(first[PANEL - 1]) else max(begin, np.int64(end[0]))
    if part < last:
        hide(s + (part - begin) * ROW, last - part, part, panel + BOUNDS)
    softmax(s, n, panel)
    values = v_block + (begin - low) * a.v_line
    product(values, np.int64(4), a.v_line, s, n, panel + SUMS, a.value_dim, panel + 2 * ROW)


float_attend = njit(**OPTIONS)(_attend)


# What touches tensors knows their dtype, through ``fetch``, ``save`` and ``size``, the bytes of a number.
def _begin(fetch: Any, size: int, pairs: bool) -> Any:
    def begin(a: Any, row: Any, head: Any, query: Any, lane: Any, lanes: Any, stage: Any, panel: Any) -> None:
        """The panel from ``lane`` on: what its lanes see, their queries, and a softmax of nothing.

        Queries are scaled, or pairs as they are: one of those is a number of 32 bits.
        """
        share, start, length = a.heads // a.groups, np.int64(int32s(a.q_start)[row]), np.int64(int32s(a.kv_len)[row])
        past = length + start - np.int64(int32s(a.q_start)[row + 1])
        factor = np.float32(a.scale / a.softcap if a.softcap > 0 else a.scale * LOG2E)
        numbers = a.key_dim // 2 if pairs else a.key_dim
        first, end = int32s(panel + BOUNDS), int32s(panel + BOUNDS + ROW)
        t, h = query + lane // share, lane % share
        for i in range(PANEL):  # lanes of no query repeat the last one
            place = a.q + (start + t) * a.q_token + (head + h) * a.q_head
            fetch(place, stage + i * a.width, numbers, factor)
            prefetch(place + share * a.q_head, a.key_dim * size)  # the next unit's
            position, low, high = past + t, np.int64(0), length
            if a.causal != 0:
                high = position + 1
            if a.window > 0:
                low, high = max(low, position + 1 - a.window), min(high, position + a.window)
            if a.chunk > 0:
                chunk = position // a.chunk * a.chunk
                low, high = max(low, chunk), min(high, chunk + a.chunk)
            first[i], end[i] = low, high
            if lane + i + 1 < lanes:
                h += 1
                if h == share:
                    t, h = t + 1, np.int64(0)
        state = float32s(panel)
        for i in range(PANEL):
            state[i], state[PANEL + i] = _LOWEST, _ZERO
        sums = float32s(panel + SUMS)
        for i in range((a.v_rows + SPARE) * PANEL):
            sums[i] = _ZERO
        queries = panel + SUMS + (a.v_rows + SPARE) * ROW
        for d in range(0, numbers, LANES):
            transpose(stage + d * 4, a.width, queries + d * ROW, ROW)
            transpose(stage + LANES * a.width + d * 4, a.width, queries + d * ROW + LANES * 4, ROW)

    return njit(**OPTIONS)(begin)


def _copy(fetch: Any, size: int) -> Any:
    def copy(a: Any, row: Any, group: Any, low: Any, high: Any, k_block: Any, v_block: Any) -> None:
        """Keys and values [low, high) of a row: of the new tokens if those are all, else from the pool."""
        start = np.int64(int32s(a.q_start)[row])
        pooled = a.keys != 0 and np.int64(int32s(a.kv_len)[row]) > np.int64(int32s(a.q_start)[row + 1]) - start
        slots = int32s(a.table + np.int64(int32s(a.table_row)[row]) * a.max_len * 4)
        for j in range(low, high):
            if pooled:
                place = np.int64(slots[j]) * a.groups + group
                k = a.keys + place * a.key_dim * size
                v = a.values + place * a.value_dim * size
            else:
                k = a.k + (start + j) * a.k_token + group * a.k_head
                v = a.v + (start + j) * a.v_token + group * a.v_head
            fetch(k, k_block + (j - low) * a.k_line, a.key_dim, _ONE)
            fetch(v, v_block + (j - low) * a.v_line, a.value_dim, _ONE)

    return njit(**OPTIONS)(copy)


def _finish(save: Any, size: int, pairs: bool) -> Any:
    def finish(a: Any, token: Any, head: Any, lane: Any, lanes: Any, stage: Any, panel: Any) -> None:
        """Write a panel's result: sums over values divided by sums of weights."""
        share, state = a.heads // a.groups, float32s(panel)
        for i in range(min(PANEL, lanes - lane)):
            factor = _ONE / state[PANEL + i]
            if a.sinks != 0:  # one more column of the softmax, without a value
                sink = float32s(a.sinks)[head + (lane + i) % share] * LOG2E
                top = max(state[i], sink)
                scale = np.float32(math.exp((state[i] - top) * _LN2))
                factor = scale / (state[PANEL + i] * scale + np.float32(math.exp((sink - top) * _LN2)))
            state[2 * PANEL + i] = factor
        numbers = a.value_dim
        if pairs:
            numbers //= 2
            flash_pairs.settle(panel + SUMS, numbers, panel + 2 * ROW)
        for d in range(0, numbers, LANES):
            transpose(panel + SUMS + d * ROW, ROW, stage + d * 4, a.width)
            transpose(panel + SUMS + d * ROW + LANES * 4, ROW, stage + LANES * a.width + d * 4, a.width)
        for i in range(min(PANEL, lanes - lane)):
            t, h, factor = token + (lane + i) // share, head + (lane + i) % share, state[2 * PANEL + i]
            save(stage + i * a.width, a.out + (t * a.heads + h) * a.value_dim * size, numbers, factor)

    return njit(**OPTIONS)(finish)


def _unit(dtype: torch.dtype, pairs: bool) -> Any:
    half, size = dtype == torch.bfloat16, dtype.itemsize
    load, save = move(half, False), move(False, half)

    def fetch(source: Any, target: Any, width: Any, factor: Any) -> None:
        """Copy a vector as float32, times ``factor``."""
        load(source, target, width, factor)

    if pairs:
        together, copy, attend = flash_pairs.TOGETHER, flash_pairs.copy, flash_pairs.attend
        fetch = save = flash_pairs.duplicate
    else:
        fetch = njit(**OPTIONS)(fetch)
        together, copy, attend = 1, _copy(fetch, size), float_attend
    begin, finish = _begin(fetch, size, pairs), _finish(save, size, pairs)

    def unit(a: Any, row: Any, group: Any, query: Any, lanes: Any) -> None:
        """Attention of ``lanes`` lanes, from the row's ``query`` on."""
        k_block = a.scratch + np.int64(thread()) * a.size
        v_block = k_block + (a.block + SPARE) * a.k_line
        s = v_block + (a.block + SPARE) * a.v_line
        stage = s + together * (a.block + SPARE) * ROW
        panels = stage + PANEL * a.width
        head, each = group * (a.heads // a.groups), SUMS + (a.q_rows + a.v_rows + SPARE) * ROW
        count = (lanes + PANEL - 1) // PANEL
        for i in range(count):
            begin(a, row, head, query, i * PANEL, lanes, stage, panels + i * each)
        low = np.int64(int32s(panels + BOUNDS)[0])
        low -= low & 1
        end = np.int64(int32s(panels + (lanes - 1) // PANEL * each + BOUNDS + ROW)[PANEL - 1])
        while low < end:
            high = min(end, (low // a.block + 1) * a.block)
            copy(a, row, group, low, high, k_block, v_block)
            for i in range(0, count, together):
                attend(a, low, high, k_block, v_block, s, panels + i * each, each if i + together <= count else 0)
            low = high
        token = np.int64(int32s(a.q_start)[row]) + query
        for lane in range(0, lanes, PANEL):
            finish(a, token, head, lane, lanes, stage, panels + lane // PANEL * each)

    return njit(**OPTIONS)(unit)


@cache
def task(dtype: torch.dtype, pairs: bool) -> Task:
    """The compiled attention, for float32 or bfloat16 tensors of any widths; ``pairs``: see :mod:`.flash_pairs`."""
    unit = _unit(dtype, pairs)

    def body(a: Any) -> None:
        q_start, share = int32s(a.q_start), a.heads // a.groups
        i, base, row, queries, blocks = np.int64(-1), np.int64(0), np.int64(0), np.int64(0), np.int64(0)
        claimed = claim(a, a.grain)
        while claimed < a.units:
            for u in range(claimed, min(claimed + a.grain, a.units)):
                while u >= base + blocks * a.groups:
                    i, base = i + 1, base + blocks * a.groups
                    row = np.int64(int32s(a.which)[i])
                    queries = np.int64(q_start[row + 1]) - np.int64(q_start[row])
                    blocks = (queries + a.queries - 1) // a.queries
                # The last queries first: they see the most keys, and threads wait for each other at the end.
                query = (blocks - 1 - (u - base) // a.groups) * a.queries
                unit(a, row, (u - base) % a.groups, query, min(a.queries, queries - query) * share)
            claimed = claim(a, a.grain)

    return Task(body, Arguments)
