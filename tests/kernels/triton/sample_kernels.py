"""Small kernels of the kinds that the server needs, with launchers: the tools of this folder are tested with them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit(do_not_specialize=["window"])
def _gather_attention(
    q, keys, values, table, lengths, out, scale, window,
    TABLE_STRIDE: tl.constexpr, SLOT: tl.constexpr, GROUP: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program: row, KV head. One query per row, over the slots that the table names."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    heads = tl.num_programs(1) * GROUP
    h, d = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_D)
    mine = (h < GROUP)[:, None] & (d < D)[None]
    at = (row * heads + head * GROUP + h)[:, None] * D + d[None]
    query = tl.load(q + at, mine, 0.0)
    length = tl.load(lengths + row)
    first = tl.maximum(length - window, 0)
    m = tl.full((BLOCK_H,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_H,), tl.float32)
    acc = tl.zeros((BLOCK_H, BLOCK_D), tl.float32)
    for j in tl.range(first, length, BLOCK_N, num_stages=STAGES):
        i = j + tl.arange(0, BLOCK_N)
        there = i < length
        slot = tl.load(table + row * TABLE_STRIDE + i, there, 0).to(tl.int64) * SLOT + head * D
        key = tl.load(keys + slot[None] + d[:, None], there[None] & (d < D)[:, None], 0.0)
        score = tl.dot(query, key, input_precision="ieee") * (scale * 1.4426950408889634)
        score = tl.where(there[None], score, float("-inf"))
        above = tl.maximum(m, tl.max(score, 1))
        p = tl.exp2(score - above[:, None])
        keep = tl.exp2(m - above)
        total = total * keep + tl.sum(p, 1)
        value = tl.load(values + slot[:, None] + d[None], there[:, None] & (d < D)[None], 0.0)
        acc = acc * keep[:, None] + tl.dot(p.to(value.dtype), value, input_precision="ieee")
        m = above
    tl.store(out + at, (acc / total[:, None]).to(out.dtype.element_ty), mine)


def gather_attention(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, table: torch.Tensor, lengths: torch.Tensor,
    window: int = 2**31 - 1, *, block_n: int = 64, warps: int = 4, stages: int = 3,
) -> torch.Tensor:  # fmt: skip
    """q [rows, heads, D], keys and values [slots, KV heads, D], table int32 [rows, longest] -> like q."""
    rows, heads, width = q.shape
    kv_heads = keys.shape[1]
    out = torch.empty_like(q)
    _gather_attention[(rows, kv_heads)](
        q, keys, values, table, lengths, out, width**-0.5, window,
        TABLE_STRIDE=table.stride(0), SLOT=keys.stride(0), GROUP=heads // kv_heads, BLOCK_H=16, BLOCK_N=block_n,
        D=width, BLOCK_D=triton.next_power_of_2(width), STAGES=stages, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out


@triton.jit
def _row_norm(x, weight, out, eps, D: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    row = tl.program_id(0).to(tl.int64) * D
    value = tl.load(x + row + i, i < D, 0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 0) / D + eps)
    result = value * scale * tl.load(weight + i, i < D, 0.0).to(tl.float32)
    tl.store(out + row + i, result.to(out.dtype.element_ty), i < D)


def row_norm(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6, warps: int = 4) -> torch.Tensor:
    """RMS norm of x [rows, D]."""
    out = torch.empty_like(x)
    width = x.shape[1]
    _row_norm[(x.shape[0],)](x, weight, out, eps, D=width, BLOCK=triton.next_power_of_2(width), num_warps=warps)
    return out


@triton.jit
def _scatter_rows(x, slots, pool, D: tl.constexpr, BLOCK: tl.constexpr):
    row, i = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    slot = tl.load(slots + row).to(tl.int64)
    tl.store(pool + slot * D + i, tl.load(x + row * D + i, i < D, 0.0), i < D)


def scatter_rows(x: torch.Tensor, slots: torch.Tensor, pool: torch.Tensor) -> None:
    """pool[slots] = x, for x [rows, D] and int32 slots [rows] without duplicates."""
    width = x.shape[1]
    _scatter_rows[(x.shape[0],)](x, slots, pool, D=width, BLOCK=triton.next_power_of_2(width))
