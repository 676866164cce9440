"""Rotary position embedding in place, fused with the RMS norms of queries and keys.

A head is in three parts, of which the first two are rotated together, number by number::

    head    | low [HALF] | high [HALF] | rest [D - 2 HALF] |        rest: read and written for the norm only
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import plans
from .launch import architecture, power_of_two


def rope(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_heads: int,
    k_heads: int,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    eps: float = 0.0,
) -> None:
    """:func:`trunkline.kernels.rope.rope_reference` as a Triton kernel.

    float32, bfloat16 or float16; computes in float32.
    ValueError unless the numbers of a head of ``qkv`` are contiguous, and for one of the weights without the other.
    """
    tokens, _, width = qkv.shape
    if qkv.stride(2) != 1 or (q_weight is None) != (k_weight is None):
        raise ValueError("the numbers of a head must be contiguous, and q_weight and k_weight come together")
    half, rest = cos.shape[-1] // 2, width - cos.shape[-1]
    heads, plan = q_heads + k_heads, plans.rows(architecture(), 2 * half if q_weight is None else width)
    rope_kernel[(triton.cdiv(tokens * heads, plan.block_m),)](
        qkv, cos.contiguous(), sin.contiguous(), q_weight, k_weight, tokens * heads, eps,
        TOKEN=qkv.stride(0), HEAD=qkv.stride(1), HEADS=heads, Q_HEADS=q_heads, D=width, HALF=half,
        BLOCK_HALF=power_of_two(half), REST=rest, BLOCK_REST=power_of_two(max(1, rest)),
        BLOCK_M=plan.block_m, num_warps=plan.warps,
    )  # fmt: skip


@triton.jit
def weight_of(
    q_weight: tl.tensor, k_weight: tl.tensor, is_query: tl.tensor, column: tl.tensor, inside: tl.tensor
) -> tl.tensor:
    """The weights [M, N] of the norm of each head [M] at the columns [N]."""
    query, key = tl.load(q_weight + column, inside, other=0.0), tl.load(k_weight + column, inside, other=0.0)
    return tl.where(is_query[:, None], query[None], key[None]).to(tl.float32)


@triton.jit(do_not_specialize=("count", "eps"))
def rope_kernel(
    qkv: tl.tensor, cos: tl.tensor, sin: tl.tensor, q_weight: tl.tensor, k_weight: tl.tensor, count: tl.tensor,
    eps: tl.tensor, TOKEN: tl.constexpr, HEAD: tl.constexpr, HEADS: tl.constexpr, Q_HEADS: tl.constexpr,
    D: tl.constexpr, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, REST: tl.constexpr, BLOCK_REST: tl.constexpr,
    BLOCK_M: tl.constexpr,
) -> None:  # fmt: skip
    """Grid (blocks of heads of all tokens); ``count`` heads in all."""
    item = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    token, head, present = item // HEADS, item % HEADS, item < count
    i = tl.arange(0, BLOCK_HALF)
    in_half, read = i < HALF, present[:, None] & (i < HALF)[None]
    start = qkv + token * TOKEN + head * HEAD
    at, angle = start[:, None] + i[None], token[:, None] * (2 * HALF) + i[None]
    low, high = tl.load(at, read, other=0.0).to(tl.float32), tl.load(at + HALF, read, other=0.0).to(tl.float32)
    if q_weight is not None:
        squares, is_query = tl.sum(low * low, 1) + tl.sum(high * high, 1), head < Q_HEADS
        j = tl.arange(0, BLOCK_REST)
        in_rest, at_rest = present[:, None] & (j < REST)[None], start[:, None] + (2 * HALF) + j[None]
        if REST > 0:
            rest = tl.load(at_rest, in_rest, other=0.0).to(tl.float32)
            squares += tl.sum(rest * rest, 1)
        scale = tl.rsqrt(squares / D + eps)[:, None]
        low *= scale * weight_of(q_weight, k_weight, is_query, i, in_half)
        high *= scale * weight_of(q_weight, k_weight, is_query, HALF + i, in_half)
        if REST > 0:
            rest *= scale * weight_of(q_weight, k_weight, is_query, 2 * HALF + j, j < REST)
            tl.store(at_rest, rest.to(qkv.dtype.element_ty), in_rest)
    cos_low = tl.load(cos + angle, read, other=0.0).to(tl.float32)
    sin_low = tl.load(sin + angle, read, other=0.0).to(tl.float32)
    cos_high = tl.load(cos + angle + HALF, read, other=0.0).to(tl.float32)
    sin_high = tl.load(sin + angle + HALF, read, other=0.0).to(tl.float32)
    tl.store(at, (low * cos_low - high * sin_low).to(qkv.dtype.element_ty), read)
    tl.store(at + HALF, (high * cos_high + low * sin_high).to(qkv.dtype.element_ty), read)
