"""Attention of rows with several new tokens (FlashAttention-2), over a paged pool or over packed keys and values.

The cached prefix and the new tokens are one sequence of keys: with a pool, all of them are read through the slot table,
since the new ones were written before. A program computes a block of a row's queries for heads that share a KV head::

    rows of a tile     query 0: head 0 … head G-1 | query 1: head 0 … head G-1 | …       BLOCK_M in all
    keys               0 . . lo . . . . . . full . . . . high . . n
                             |  whole tiles  | with a mask |     lo, high: of any query of the block (window, chunk)

Blocks are numbered over all rows. Row ``r`` begins at block ``q_start[r] // queries + r``, so that a program finds its
row by a binary search in ``q_start``, and the host uploads no list of blocks; at most one block per row is empty.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl

from trunkline.kernels.layout import Layout

from . import plans
from .elements import LOG2E
from .launch import LONGEST, architecture, dot_width, row_span, token_major
from .tiles import add_tiles


def extend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keys: torch.Tensor | None,
    values: torch.Tensor | None,
    layout: Layout,
    row_ids: Sequence[int] | np.ndarray,
    out: torch.Tensor,
    *,
    scale: float,
    causal: bool = True,
    window: int = 0,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    chunk: int = 0,
) -> None:
    """:func:`trunkline.kernels.attention_extend.extend_reference` as a Triton kernel.

    float32, bfloat16 or float16; the pool may have another of these dtypes than ``q`` and ``out``. Scores and sums are
    float32. ``keys``, ``values`` and ``out`` are contiguous. ``row_ids`` are consecutive; ValueError otherwise.
    """
    heads, width = q.shape[1:]
    kv_heads, value_width = v.shape[1:]
    paged = keys is not None and values is not None
    if keys is None or values is None:
        keys, values = token_major(k), token_major(v)
    q, tensors = token_major(q), layout.on(q.device)
    first_row, rows = row_span(row_ids)
    plan = plans.extend(architecture(), max(width, value_width), keys.itemsize)
    group = heads // kv_heads
    head_blocks = -(-group // plan.block_m)
    block_heads = -(-group // head_blocks)
    queries = plan.block_m // block_heads
    tokens = int(layout.q_start[first_row + rows] - layout.q_start[first_row])
    sinks = None if sinks is None else sinks.detach()
    extend_kernel[tokens // queries + rows, kv_heads * head_blocks](
        q, keys, values, tensors.table, tensors.q_start, tensors.kv_len, tensors.table_row, out, sinks,
        first_row, rows, min(window, LONGEST), min(chunk, LONGEST), scale, softcap,
        Q_TOKEN=q.stride(0), Q_HEAD=q.stride(1), K_SLOT=keys.stride(0), K_HEAD=keys.stride(1),
        V_SLOT=values.stride(0), V_HEAD=values.stride(1), TABLE_ROW=tensors.table.stride(0) if paged else 0,
        OUT_TOKEN=out.stride(0), OUT_HEAD=out.stride(1),
        GROUP=group, HEAD_BLOCKS=head_blocks, BLOCK_HEADS=block_heads, BLOCK_M=plan.block_m, BLOCK_N=plan.block_n,
        D=width, BLOCK_D=dot_width(width), DV=value_width, BLOCK_DV=dot_width(value_width),
        CAUSAL=causal, PAGED=paged, CAP=softcap > 0, STAGES=plan.stages, num_warps=plan.warps,
    )  # fmt: skip


@triton.jit
def find_block(
    q_start: tl.tensor, first_row: tl.tensor, rows: tl.tensor, block: tl.tensor, QUERIES: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """(row, first query in the row) of a block of ``QUERIES`` queries."""
    origin = tl.load(q_start + first_row)
    low, high = 0, rows
    while high - low > 1:
        middle = (low + high) // 2
        if (tl.load(q_start + first_row + middle) - origin) // QUERIES + middle <= block:
            low = middle
        else:
            high = middle
    before = (tl.load(q_start + first_row + low) - origin) // QUERIES + low
    return first_row + low, (block - before) * QUERIES


@triton.jit
def key_range(
    first: tl.tensor, last: tl.tensor, n: tl.tensor, window: tl.tensor, chunk: tl.tensor, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """(low, high, full) for queries at the positions ``first`` to ``last`` of a row with ``n`` keys.

    The keys ``[low, high)`` are visible to any of the queries; tiles below ``full`` to all of them, every key.
    """
    low, high = 0, n
    if CAUSAL:
        high = last + 1
    if window > 0:
        low, high = tl.maximum(low, first - window + 1), tl.minimum(high, last + window)
    if chunk > 0:
        low = tl.maximum(low, first // chunk * chunk)
        high = tl.minimum(high, (last // chunk + 1) * chunk)
    full = low // BLOCK_N * BLOCK_N
    if (window == 0) & (chunk == 0):
        full = ((first + 1) if CAUSAL else n) // BLOCK_N * BLOCK_N
    return low, high, full


@triton.jit(
    do_not_specialize=("q_start", "kv_len", "table_row", "first_row", "rows", "window", "chunk", "scale", "softcap")
)
def extend_kernel(
    q: tl.tensor, keys: tl.tensor, values: tl.tensor, table: tl.tensor, q_start: tl.tensor, kv_len: tl.tensor,
    table_row: tl.tensor, out: tl.tensor, sinks: tl.tensor, first_row: tl.tensor, rows: tl.tensor, window: tl.tensor,
    chunk: tl.tensor, scale: tl.tensor, softcap: tl.tensor, Q_TOKEN: tl.constexpr, Q_HEAD: tl.constexpr,
    K_SLOT: tl.constexpr, K_HEAD: tl.constexpr, V_SLOT: tl.constexpr, V_HEAD: tl.constexpr, TABLE_ROW: tl.constexpr,
    OUT_TOKEN: tl.constexpr, OUT_HEAD: tl.constexpr, GROUP: tl.constexpr, HEAD_BLOCKS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, CAUSAL: tl.constexpr, PAGED: tl.constexpr, CAP: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:  # fmt: skip
    """Grid (blocks of queries, KV heads x blocks of heads); the last blocks, which see most keys, run first."""
    QUERIES: tl.constexpr = BLOCK_M // BLOCK_HEADS
    row, first = find_block(q_start, first_row, rows, tl.num_programs(0) - 1 - tl.program_id(0), QUERIES)
    start, stop, n = tl.load(q_start + row), tl.load(q_start + row + 1), tl.load(kv_len + row)
    if first >= stop - start:
        return
    kv_head = tl.program_id(1) // HEAD_BLOCKS
    m, d, e = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    in_group, ahead = tl.program_id(1) % HEAD_BLOCKS * BLOCK_HEADS + m % BLOCK_HEADS, first + m // BLOCK_HEADS
    # Rows of the tile beyond the last whole query belong to the next program.
    present = (ahead < stop - start) & (in_group < GROUP) & (m < QUERIES * BLOCK_HEADS)
    head, token = kv_head * GROUP + in_group, (start + ahead).to(tl.int64)
    query = tl.load(
        q + token[:, None] * Q_TOKEN + head[:, None] * Q_HEAD + d[None], present[:, None] & (d < D)[None], other=0.0
    )
    position, first_position = n - (stop - start) + ahead, n - (stop - start) + first
    low, high, full = key_range(
        first_position, tl.minimum(first_position + QUERIES, n) - 1, n, window, chunk, BLOCK_N, CAUSAL
    )
    largest, total = tl.full((BLOCK_M,), -float("inf"), tl.float32), tl.zeros((BLOCK_M,), tl.float32)
    if sinks is not None:
        largest = tl.load(sinks + head, present, other=0.0).to(tl.float32) * LOG2E
        total = tl.full((BLOCK_M,), 1.0, tl.float32)
    result = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    keys, values, slots = keys + kv_head * K_HEAD, values + kv_head * V_HEAD, table
    if PAGED:
        slots += tl.load(table_row + row).to(tl.int64) * TABLE_ROW
    else:
        keys, values = keys + start.to(tl.int64) * K_SLOT, values + start.to(tl.int64) * V_SLOT
    result, largest, total = add_tiles(
        result, largest, total, query, position, keys, values, slots, low // BLOCK_N * BLOCK_N, full, low, high, window,
        chunk, scale, softcap, K_SLOT, V_SLOT, D, BLOCK_D, DV, BLOCK_DV, BLOCK_N, CAUSAL, False, PAGED, CAP, STAGES,
    )  # fmt: skip
    result, largest, total = add_tiles(
        result, largest, total, query, position, keys, values, slots, full, high, low, high, window, chunk, scale,
        softcap, K_SLOT, V_SLOT, D, BLOCK_D, DV, BLOCK_DV, BLOCK_N, CAUSAL, True, PAGED, CAP, STAGES,
    )  # fmt: skip
    result = result / tl.where(total == 0, 1.0, total)[:, None]
    at = out + token[:, None] * OUT_TOKEN + head[:, None] * OUT_HEAD + e[None]
    tl.store(at, result.to(out.dtype.element_ty), present[:, None] & (e < DV)[None])
