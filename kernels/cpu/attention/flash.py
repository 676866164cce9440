"""The ``cpu`` backend's attention for rows with many queries: FlashAttention, blocked for CPU caches.

A *query vector* is one token's query of one head. Work is divided into units of one row, one KV head and
one block of queries, with the query vectors of all heads that share the KV head. A *panel* is 16 query
vectors, transposed to ``[width, 16]``: each of them has a lane of its own, and so have its scores, its sums
over values and its softmax state. So each number of a key or value is multiplied by all 16 at once, the
softmax needs no reduction across lanes, and a panel reads only the keys that one of its queries sees.
Keys and values are copied block by block, from the KV pool by slot or from the new tokens; all panels
of the unit use the copy. :mod:`.flash_arguments` shows the blocks in the caches.

Blocks of keys begin at multiples of their size. So a query's result depends neither on the queries
beside it nor on the number of threads.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from numba import njit

from trunkline.kernels.cpu.exponential import LOG2E
from trunkline.kernels.cpu.quantized import cache as int8_cache
from trunkline.kernels.cpu.threads import OPTIONS, Kernel, claim, float32s, int32s, thread, threads
from trunkline.kernels.cpu.vectors import LANES

from . import flash_pairs
from .flash_arguments import Arguments
from .flash_tiles import (
    BOUNDS,
    LOWEST,
    PANEL,
    ROW,
    SPARE,
    SUMS,
    apply_softcap,
    convert,
    mask,
    register_tile,
    softmax,
    transpose,
)
from .one_query import normalizer
from .paged_blocks import prefetch

_ONE, _ZERO, _LOWEST = np.float32(1), np.float32(0), np.float32(LOWEST)


_tile6, _tile4 = register_tile(6), register_tile(4)


def _product(a: Any, a_row: Any, a_step: Any, b: Any, n: Any, c: Any, rows: Any, factor: Any) -> None:
    """The product that :func:`.register_tile` describes, for ``rows`` rows; up to three more may be written."""
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
    """One panel over the keys ``[low, high)`` in ``k_block``: scores, online softmax, sums over values.

    ``s`` is scratch memory for the scores, [keys, PANEL] float32.
    """
    first, end = int32s(panel + BOUNDS), int32s(panel + BOUNDS + ROW)
    begin, last = max(low, np.int64(first[0])), min(high, np.int64(end[PANEL - 1]))
    n = last - begin
    if n <= 0:
        return
    queries = panel + SUMS + (a.v_rows + SPARE) * ROW
    product(k_block + (begin - low) * a.k_stride, a.k_stride, np.int64(4), queries, a.key_dim, s, n, np.int64(0))
    if a.softcap > 0:
        apply_softcap(s, n, np.float32(a.softcap * LOG2E))
    # No mask is needed where all lanes see all keys: [first of the last lane, end of the first lane).
    mask_from = begin if begin < np.int64(first[PANEL - 1]) else max(begin, np.int64(end[0]))
    if mask_from < last:
        mask(s + (mask_from - begin) * ROW, last - mask_from, mask_from, panel + BOUNDS)
    softmax(s, n, panel)
    values = v_block + (begin - low) * a.v_stride
    product(values, np.int64(4), a.v_stride, s, n, panel + SUMS, a.value_dim, panel + 2 * ROW)


float_attend = njit(**OPTIONS)(_attend)


# Functions that read or write tensors are made for a dtype: by ``load_vector``, ``store_vector`` and ``size``, the
# bytes of one number.
def _start_panel(load_vector: Any, size: int, pairs: bool) -> Any:
    def start_panel(a: Any, row: Any, head: Any, query: Any, lane: Any, lanes: Any, staging: Any, panel: Any) -> None:
        """Initialise the panel of the query vectors from number ``lane`` on: their key bounds, queries and sums.

        float32 queries are scaled. bfloat16 pairs are copied unchanged, each as one number of 32 bits.
        """
        group_size = a.heads // a.kv_heads
        start, length = np.int64(int32s(a.q_start)[row]), np.int64(int32s(a.kv_len)[row])
        past = length + start - np.int64(int32s(a.q_start)[row + 1])
        factor = np.float32(a.scale / a.softcap if a.softcap > 0 else a.scale * LOG2E)
        numbers = a.key_dim // 2 if pairs else a.key_dim
        first, end = int32s(panel + BOUNDS), int32s(panel + BOUNDS + ROW)
        t, h = query + lane // group_size, lane % group_size
        for i in range(PANEL):  # lanes beyond the last query vector repeat it
            address = a.q + (start + t) * a.q_token + (head + h) * a.q_head
            load_vector(address, staging + i * a.staging_row, numbers, factor)
            prefetch(address + group_size * a.q_head, a.key_dim * size)  # of the next unit, the next KV head
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
                if h == group_size:
                    t, h = t + 1, np.int64(0)
        state = float32s(panel)
        for i in range(PANEL):
            state[i], state[PANEL + i] = _LOWEST, _ZERO
        sums = float32s(panel + SUMS)
        for i in range((a.v_rows + SPARE) * PANEL):
            sums[i] = _ZERO
        queries = panel + SUMS + (a.v_rows + SPARE) * ROW
        for d in range(0, numbers, LANES):
            transpose(staging + d * 4, a.staging_row, queries + d * ROW, ROW)
            transpose(staging + LANES * a.staging_row + d * 4, a.staging_row, queries + d * ROW + LANES * 4, ROW)

    return njit(**OPTIONS)(start_panel)


def _copy(load_vector: Any, size: int, int8: bool) -> Any:
    def copy(a: Any, row: Any, kv_head: Any, low: Any, high: Any, k_block: Any, v_block: Any) -> None:
        """Copy keys and values ``[low, high)`` of a row: from the pool if it has a cached prefix, else from k and v.

        With an int8 pool, there are no k and v.
        """
        start = np.int64(int32s(a.q_start)[row])
        new = np.int64(int32s(a.q_start)[row + 1]) - start
        pooled = a.keys != 0 and (a.k == 0 or np.int64(int32s(a.kv_len)[row]) > new)
        slots = int32s(a.table + np.int64(int32s(a.table_row)[row]) * a.max_len * 4)
        for j in range(low, high):
            if pooled:
                address = np.int64(slots[j]) * a.kv_heads + kv_head
                if int8:
                    k = a.keys + address * int8_cache.row_bytes(a.key_dim)
                    v = a.values + address * int8_cache.row_bytes(a.value_dim)
                else:
                    k = a.keys + address * a.key_dim * size
                    v = a.values + address * a.value_dim * size
            else:
                k = a.k + (start + j) * a.k_token + kv_head * a.k_head
                v = a.v + (start + j) * a.v_token + kv_head * a.v_head
            load_vector(k, k_block + (j - low) * a.k_stride, a.key_dim, _ONE)
            load_vector(v, v_block + (j - low) * a.v_stride, a.value_dim, _ONE)

    return njit(**OPTIONS)(copy)


def _finish_panel(store_vector: Any, size: int, pairs: bool) -> Any:
    def finish_panel(a: Any, token: Any, head: Any, lane: Any, lanes: Any, staging: Any, panel: Any) -> None:
        """Write a panel's results: sums over values, divided by the sums of softmax weights."""
        group_size, state = a.heads // a.kv_heads, float32s(panel)
        for i in range(min(PANEL, lanes - lane)):
            state[2 * PANEL + i] = normalizer(a, head + (lane + i) % group_size, state[i], state[PANEL + i])
        numbers = a.value_dim
        if pairs:
            numbers //= 2
            flash_pairs.scale_to_pairs(panel + SUMS, numbers, panel + 2 * ROW)
        for d in range(0, numbers, LANES):
            transpose(panel + SUMS + d * ROW, ROW, staging + d * 4, a.staging_row)
            transpose(panel + SUMS + d * ROW + LANES * 4, ROW, staging + LANES * a.staging_row + d * 4, a.staging_row)
        for i in range(min(PANEL, lanes - lane)):
            t, h, factor = token + (lane + i) // group_size, head + (lane + i) % group_size, state[2 * PANEL + i]
            store_vector(staging + i * a.staging_row, a.out + (t * a.heads + h) * a.value_dim * size, numbers, factor)

    return njit(**OPTIONS)(finish_panel)


def _unit(dtype: torch.dtype, pairs: bool, int8: bool) -> Any:
    bf16, size = dtype == torch.bfloat16, dtype.itemsize
    load, store_vector = convert(bf16, False), convert(False, bf16)

    def load_vector(source: Any, target: Any, width: Any, factor: Any) -> None:
        """Copy a vector, converted to float32 and multiplied by ``factor``."""
        load(source, target, width, factor)

    if pairs:
        panels_per_call, copy, attend = flash_pairs.PANELS_PER_CALL, flash_pairs.copy, flash_pairs.attend
        load_vector = store_vector = flash_pairs.copy_bits
    else:
        load_vector = njit(**OPTIONS)(load_vector)
        panels_per_call, copy, attend = 1, _copy(int8_cache.load if int8 else load_vector, size, int8), float_attend
    start_panel, finish_panel = _start_panel(load_vector, size, pairs), _finish_panel(store_vector, size, pairs)

    def unit(a: Any, row: Any, kv_head: Any, query: Any, lanes: Any) -> None:
        """Attention of one unit: ``lanes`` query vectors, from the row's token ``query`` on."""
        k_block = a.scratch + np.int64(thread()) * a.scratch_size
        v_block = k_block + (a.block_keys + SPARE) * a.k_stride
        s = v_block + (a.block_keys + SPARE) * a.v_stride
        staging = s + panels_per_call * (a.block_keys + SPARE) * ROW
        panels = staging + PANEL * a.staging_row
        head, panel_bytes = kv_head * (a.heads // a.kv_heads), SUMS + (a.q_rows + a.v_rows + SPARE) * ROW
        count = (lanes + PANEL - 1) // PANEL
        for i in range(count):
            start_panel(a, row, head, query, i * PANEL, lanes, staging, panels + i * panel_bytes)
        low = np.int64(int32s(panels + BOUNDS)[0])
        low -= low & 1
        end = np.int64(int32s(panels + (lanes - 1) // PANEL * panel_bytes + BOUNDS + ROW)[PANEL - 1])
        while low < end:
            high = min(end, (low // a.block_keys + 1) * a.block_keys)
            copy(a, row, kv_head, low, high, k_block, v_block)
            for i in range(0, count, panels_per_call):
                attend(
                    a,
                    low,
                    high,
                    k_block,
                    v_block,
                    s,
                    panels + i * panel_bytes,
                    panel_bytes if i + panels_per_call <= count else 0,
                )
            low = high
        token = np.int64(int32s(a.q_start)[row]) + query
        for lane in range(0, lanes, PANEL):
            finish_panel(a, token, head, lane, lanes, staging, panels + lane // PANEL * panel_bytes)

    return njit(**OPTIONS)(unit)


@cache
def kernel(dtype: torch.dtype, pairs: bool, int8: bool = False) -> Kernel:
    """The compiled kernel for float32 or bfloat16 tensors of any widths; with ``pairs``: :mod:`.flash_pairs`.

    The pool is int8 if ``int8``, which excludes ``pairs``, else of ``dtype``.
    """
    unit = _unit(dtype, pairs, int8)

    def body(a: Any) -> None:
        q_start, group_size, units = int32s(a.q_start), a.heads // a.kv_heads, np.int64(0)
        for r in range(a.prompts):
            row = np.int64(int32s(a.row_ids)[r])
            queries = np.int64(q_start[row + 1]) - np.int64(q_start[row])
            units += (queries + a.unit_queries - 1) // a.unit_queries * a.kv_heads
        grain = max(np.int64(1), units // (np.int64(threads()) * 32))  # units that a thread claims at a time
        i, base, row, queries, blocks = np.int64(-1), np.int64(0), np.int64(0), np.int64(0), np.int64(0)
        claimed = claim(a, grain)
        while claimed < units:
            for u in range(claimed, min(claimed + grain, units)):
                while u >= base + blocks * a.kv_heads:
                    i, base = i + 1, base + blocks * a.kv_heads
                    row = np.int64(int32s(a.row_ids)[i])
                    queries = np.int64(q_start[row + 1]) - np.int64(q_start[row])
                    blocks = (queries + a.unit_queries - 1) // a.unit_queries
                # The last queries first: under a causal mask they see the most keys. Long units at the end
                # would keep the other threads waiting.
                query = (blocks - 1 - (u - base) // a.kv_heads) * a.unit_queries
                unit(a, row, (u - base) % a.kv_heads, query, min(a.unit_queries, queries - query) * group_size)
            claimed = claim(a, grain)

    return Kernel(body, Arguments)
