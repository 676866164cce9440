"""Paged decode attention: one query per row, the row's keys divided among programs (split KV, Flash-Decoding).

A program computes all query heads of one KV head (or some of them) over one share of a row's visible keys, so that
each key is read once::

    row's keys        0 . . lo . . . . . . . . . . . n       lo: the first visible key (window, chunk)
    shares                  |split 0|split 1|split 2|        a multiple of BLOCK_N keys each
    scores of a tile        [BLOCK_H heads, BLOCK_N keys]

With several splits, a program writes its unnormalised sum, its largest score and the sum of its weights;
:func:`combine_kernel` adds them.

Lengths, slots and table rows are read from the layout's tensors; host arrays only bound them. A program without keys
returns at once. So a CUDA graph of the launches can be replayed with other rows.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl

from trunkline.kernels.layout import Layout

from . import cost, plans
from .elements import LOG2E
from .launch import LONGEST, architecture, dot_width, multiprocessors, row_span, token_major
from .tiles import add_tiles

COMBINED, COMBINING_WARPS = 16, 4  # splits that are read at a time, by programs of this size
VARYING = ("first_row", "splits", "window", "chunk")  # arguments of both kernels


def decode(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    layout: Layout,
    row_ids: np.ndarray,
    out: torch.Tensor,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    chunk: int = 0,
) -> None:
    """:func:`trunkline.kernels.attention_decode.decode_reference` as a Triton kernel.

    float32, bfloat16 or float16; ``keys`` and ``values`` may have another of these dtypes than ``q``.
    Scores and sums are float32. ``keys``, ``values`` and ``out`` are contiguous. ValueError unless ``row_ids`` are
    consecutive.
    """
    heads, width = q.shape[1:]
    kv_heads, value_width = values.shape[1:]
    q, tensors = token_major(q), layout.on(q.device)
    first_row, rows = row_span(row_ids)
    group, plan = heads // kv_heads, plans.decode(architecture(), max(width, value_width), keys.itemsize)
    block_heads = min(plan.block_m, dot_width(group))
    head_blocks = -(-group // block_heads)
    lengths, span = layout.kv_len[first_row : first_row + rows], min(window or LONGEST, chunk or LONGEST)
    key_bytes = (width + value_width) * keys.itemsize
    work = cost.DecodeWork.of(lengths, span, heads, kv_heads * head_blocks, key_bytes, value_width)
    splits = cost.splits(architecture(), plan, work, layout.bounds, multiprocessors())
    parts = q.new_empty((rows, heads, splits, value_width) if splits > 1 else 0, dtype=torch.float32)
    stats = q.new_empty((rows, heads, splits, 2) if splits > 1 else 0, dtype=torch.float32)
    sinks = None if sinks is None else sinks.detach()
    window, chunk = min(window, LONGEST), min(chunk, LONGEST)
    sizes = {"HEADS": heads, "BLOCK_N": plan.block_n, "SMALLEST_SHARE": plan.smallest_share, "DV": value_width}
    sizes |= {"BLOCK_DV": dot_width(value_width), "OUT_TOKEN": out.stride(0), "OUT_HEAD": out.stride(1)}
    split_kernel[rows, kv_heads * head_blocks, splits](
        q, keys, values, tensors.table, tensors.q_start, tensors.kv_len, tensors.table_row, out, parts, stats, sinks,
        first_row, splits, window, chunk, scale, softcap,
        Q_TOKEN=q.stride(0), Q_HEAD=q.stride(1), K_SLOT=keys.stride(0), K_HEAD=keys.stride(1),
        V_SLOT=values.stride(0), V_HEAD=values.stride(1), TABLE_ROW=tensors.table.stride(0),
        GROUP=group, HEAD_BLOCKS=head_blocks, BLOCK_H=block_heads, D=width, BLOCK_D=dot_width(width),
        CAP=softcap > 0, SPLIT=splits > 1, STAGES=plan.stages, num_warps=plan.warps, **sizes,
    )  # fmt: skip
    if splits > 1:
        combine_kernel[rows, heads](
            parts, stats, sinks, out, tensors.q_start, tensors.kv_len, first_row, splits, window, chunk,
            BLOCK_S=COMBINED, num_warps=COMBINING_WARPS, **sizes,
        )  # fmt: skip


@triton.jit
def visible(n: tl.tensor, window: tl.tensor, chunk: tl.tensor) -> tl.tensor:
    """The first key that the query at position ``n - 1`` sees."""
    first = 0
    if window > 0:
        first = tl.maximum(first, n - window)
    if chunk > 0:
        first = tl.maximum(first, (n - 1) // chunk * chunk)
    return first


@triton.jit
def share_of(count: tl.tensor, splits: tl.tensor, BLOCK_N: tl.constexpr, SMALLEST_SHARE: tl.constexpr) -> tl.tensor:
    """Keys per split, if ``count`` are visible."""
    return tl.maximum(tl.cdiv(tl.cdiv(count, splits), BLOCK_N) * BLOCK_N, SMALLEST_SHARE)


@triton.jit(do_not_specialize=("q_start", "kv_len", "table_row", *VARYING, "scale", "softcap"))
def split_kernel(
    q: tl.tensor, keys: tl.tensor, values: tl.tensor, table: tl.tensor, q_start: tl.tensor, kv_len: tl.tensor,
    table_row: tl.tensor, out: tl.tensor, parts: tl.tensor, stats: tl.tensor, sinks: tl.tensor, first_row: tl.tensor,
    splits: tl.tensor, window: tl.tensor, chunk: tl.tensor, scale: tl.tensor, softcap: tl.tensor, Q_TOKEN: tl.constexpr,
    Q_HEAD: tl.constexpr, K_SLOT: tl.constexpr, K_HEAD: tl.constexpr, V_SLOT: tl.constexpr, V_HEAD: tl.constexpr,
    TABLE_ROW: tl.constexpr, OUT_TOKEN: tl.constexpr, OUT_HEAD: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr,
    HEAD_BLOCKS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, SMALLEST_SHARE: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr, CAP: tl.constexpr,
    SPLIT: tl.constexpr, STAGES: tl.constexpr,
) -> None:  # fmt: skip
    """Grid (rows, KV heads x blocks of heads, splits)."""
    local, block, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    row = first_row + local
    n = tl.load(kv_len + row)
    begin, end = visible(n, window, chunk), n
    if SPLIT:
        share = share_of(n - begin, splits, BLOCK_N, SMALLEST_SHARE)
        begin += split * share
        end = tl.minimum(begin + share, n)
        if begin >= end:
            return
    token = tl.load(q_start + row).to(tl.int64)
    slots = table + tl.load(table_row + row).to(tl.int64) * TABLE_ROW
    kv_head = block // HEAD_BLOCKS
    h, d, e = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    in_group = block % HEAD_BLOCKS * BLOCK_H + h
    head, present = kv_head * GROUP + in_group, in_group < GROUP
    query = tl.load(q + token * Q_TOKEN + head[:, None] * Q_HEAD + d[None], present[:, None] & (d < D)[None], other=0.0)
    largest = tl.full((BLOCK_H,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_H,), tl.float32)
    if sinks is not None and not SPLIT:
        largest = tl.load(sinks + head, present, other=0.0).to(tl.float32) * LOG2E
        total = tl.full((BLOCK_H,), 1.0, tl.float32)
    result = tl.zeros((BLOCK_H, BLOCK_DV), tl.float32)
    result, largest, total = add_tiles(
        result, largest, total, query, head, keys + kv_head * K_HEAD, values + kv_head * V_HEAD, slots, begin, end,
        begin, end, 0, 0, scale, softcap, K_SLOT, V_SLOT, D, BLOCK_D, DV, BLOCK_DV, BLOCK_N, False, True, True, CAP,
        STAGES,
    )  # fmt: skip
    stored = present[:, None] & (e < DV)[None]
    if SPLIT:
        at = (local * HEADS + head) * splits + split
        tl.store(parts + at[:, None] * DV + e[None], result, stored)
        tl.store(stats + at * 2, largest, present)
        tl.store(stats + at * 2 + 1, total, present)
    else:
        result = result / tl.where(total == 0, 1.0, total)[:, None]
        tl.store(out + token * OUT_TOKEN + head[:, None] * OUT_HEAD + e[None], result.to(out.dtype.element_ty), stored)


@triton.jit(do_not_specialize=("q_start", "kv_len", *VARYING))
def combine_kernel(
    parts: tl.tensor, stats: tl.tensor, sinks: tl.tensor, out: tl.tensor, q_start: tl.tensor, kv_len: tl.tensor,
    first_row: tl.tensor, splits: tl.tensor, window: tl.tensor, chunk: tl.tensor, OUT_TOKEN: tl.constexpr,
    OUT_HEAD: tl.constexpr, HEADS: tl.constexpr, BLOCK_N: tl.constexpr, SMALLEST_SHARE: tl.constexpr, DV: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_S: tl.constexpr,
) -> None:  # fmt: skip
    """Grid (rows, heads). Reads only the splits that have keys: the others' memory isn't written."""
    local, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = first_row + local
    n = tl.load(kv_len + row)
    count = n - visible(n, window, chunk)
    used = tl.cdiv(count, share_of(count, splits, BLOCK_N, SMALLEST_SHARE))
    s, e = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_DV)
    largest, total = -float("inf"), 0.0
    if sinks is not None:
        largest, total = tl.load(sinks + head).to(tl.float32) * LOG2E, 1.0
    result = tl.zeros((BLOCK_DV,), tl.float32)
    for start in range(0, used, BLOCK_S):
        at = (local * HEADS + head) * splits + start + s
        written = start + s < used
        split_largest = tl.load(stats + at * 2, written, other=-float("inf"))
        split_total = tl.load(stats + at * 2 + 1, written, other=0.0)
        part = tl.load(parts + at[:, None] * DV + e[None], written[:, None] & (e < DV)[None], other=0.0)
        new_largest = tl.maximum(largest, tl.max(split_largest, 0))
        weight = tl.exp2(split_largest - new_largest)
        kept = tl.exp2(largest - new_largest)
        total = total * kept + tl.sum(split_total * weight, 0)
        result = result * kept + tl.sum(part * weight[:, None], 0)
        largest = new_largest
    token = tl.load(q_start + row).to(tl.int64)
    result = result / tl.where(total == 0, 1.0, total)
    tl.store(out + token * OUT_TOKEN + head * OUT_HEAD + e, result.to(out.dtype.element_ty), e < DV)
