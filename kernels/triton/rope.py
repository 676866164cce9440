"""Rotary position embedding, fused with the RMS norms of queries and keys and with the write to the KV pool.

A head is in three parts, of which the first two are rotated together, number by number::

    head    | low [HALF] | high [HALF] | rest [REST] |        rest: read for the norm and for the pool only

Programs rotate blocks of query and key heads. With a pool, rotated keys are stored in their slots and not in ``qkv``,
and further programs copy blocks of value heads.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from trunkline.kernels.layout import KVSlots

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
    kv_slots: KVSlots | None = None,
) -> None:
    """:func:`trunkline.kernels.rope.rope_reference` as a Triton kernel, in one launch.

    float32, bfloat16 or float16, also in the pool; computes in float32. With ``kv_slots``, the key heads of ``qkv``
    aren't rotated: attention over a pool reads keys from the pool only.
    ValueError unless the numbers of a head of ``qkv`` are contiguous, and for one of the weights without the other.
    """
    tokens, _, width = qkv.shape
    if qkv.stride(2) != 1 or (q_weight is None) != (k_weight is None):
        raise ValueError("the numbers of a head must be contiguous, and q_weight and k_weight come together")
    half = cos.shape[-1] // 2
    rest = 0 if q_weight is None and kv_slots is None else width - 2 * half
    plan = plans.heads(architecture(), 2 * half + rest)
    keys, values, out_slots = (None, None, None) if kv_slots is None else kv_slots
    copied = 0 if kv_slots is None else tokens * k_heads
    blocks = triton.cdiv(tokens * (q_heads + k_heads), plan.block_m) + triton.cdiv(copied, plan.block_m)
    rope_kernel[(blocks,)](
        qkv, cos.contiguous(), sin.contiguous(), q_weight, k_weight, keys, values, out_slots, tokens, eps,
        TOKEN=qkv.stride(0), HEAD=qkv.stride(1), Q_HEADS=q_heads, K_HEADS=k_heads, D=width, BLOCK_D=power_of_two(width),
        HALF=half, BLOCK_HALF=power_of_two(half), REST=rest, BLOCK_REST=power_of_two(max(1, rest)),
        BLOCK_M=plan.block_m, num_warps=plan.warps,
    )  # fmt: skip


@triton.jit
def weight_of(
    q_weight: tl.tensor, k_weight: tl.tensor, is_query: tl.tensor, column: tl.tensor, inside: tl.tensor
) -> tl.tensor:
    """The weights [M, N] of the norm of each head [M] at the columns [N]."""
    query, key = tl.load(q_weight + column, inside, other=0.0), tl.load(k_weight + column, inside, other=0.0)
    return tl.where(is_query[:, None], query[None], key[None]).to(tl.float32)


@triton.jit
def store_part(
    part: tl.tensor, column: tl.tensor, inside: tl.tensor, qkv: tl.tensor, start: tl.tensor, keys: tl.tensor,
    place: tl.tensor, is_query: tl.tensor,
) -> None:  # fmt: skip
    """Store ``part`` [M, N], float32: the columns [N] of heads, which begin at ``start`` and ``place`` [M]."""
    rounded, at = part.to(qkv.dtype.element_ty), qkv + start[:, None] + column[None]
    if keys is None:
        tl.store(at, rounded, inside)
    else:
        tl.store(at, rounded, inside & is_query[:, None])
        tl.store(keys + place[:, None] + column[None], rounded.to(keys.dtype.element_ty), inside & ~is_query[:, None])


@triton.jit
def copy_values(
    qkv: tl.tensor, values: tl.tensor, out_slots: tl.tensor, item: tl.tensor, count: tl.tensor, TOKEN: tl.constexpr,
    HEAD: tl.constexpr, FIRST_HEAD: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
) -> None:  # fmt: skip
    """Copy the value heads ``item`` [M], of ``count`` heads of all tokens, to their slots."""
    token, head, present, column = item // HEADS, item % HEADS, item < count, tl.arange(0, BLOCK_D)
    inside = present[:, None] & (column < D)[None]
    start = token * TOKEN + (FIRST_HEAD + head) * HEAD
    value = tl.load(qkv + start[:, None] + column[None], inside, other=0.0)
    slot = tl.load(out_slots + token, present, other=0)
    place = (slot * HEADS + head) * D
    tl.store(values + place[:, None] + column[None], value.to(values.dtype.element_ty), inside)


@triton.jit(do_not_specialize=("out_slots", "tokens", "eps"))
def rope_kernel(
    qkv: tl.tensor, cos: tl.tensor, sin: tl.tensor, q_weight: tl.tensor, k_weight: tl.tensor, keys: tl.tensor,
    values: tl.tensor, out_slots: tl.tensor, tokens: tl.tensor, eps: tl.tensor, TOKEN: tl.constexpr, HEAD: tl.constexpr,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr, REST: tl.constexpr, BLOCK_REST: tl.constexpr, BLOCK_M: tl.constexpr,
) -> None:  # fmt: skip
    """Grid (blocks of query and key heads of all tokens; with a pool, then blocks of value heads of all tokens)."""
    HEADS: tl.constexpr = Q_HEADS + K_HEADS
    count, first = tokens * HEADS, tl.program_id(0).to(tl.int64) * BLOCK_M
    if keys is not None and first >= count:
        item = first - tl.cdiv(count, BLOCK_M) * BLOCK_M + tl.arange(0, BLOCK_M)
        copy_values(qkv, values, out_slots, item, tokens * K_HEADS, TOKEN, HEAD, HEADS, K_HEADS, D, BLOCK_D)
        return
    item = first + tl.arange(0, BLOCK_M)
    token, head, present = item // HEADS, item % HEADS, item < count
    is_query, start, place = head < Q_HEADS, token * TOKEN + head * HEAD, token
    i, j = tl.arange(0, BLOCK_HALF), tl.arange(0, BLOCK_REST)
    in_half, inside, in_rest = i < HALF, present[:, None] & (i < HALF)[None], present[:, None] & (j < REST)[None]
    at = qkv + start[:, None] + i[None]
    low, high = tl.load(at, inside, other=0.0).to(tl.float32), tl.load(at + HALF, inside, other=0.0).to(tl.float32)
    if REST > 0:
        if q_weight is None:
            in_rest &= ~is_query[:, None]
        rest = tl.load(qkv + start[:, None] + (2 * HALF + j)[None], in_rest, other=0.0).to(tl.float32)
    if q_weight is not None:
        squares = tl.sum(low * low, 1) + tl.sum(high * high, 1)
        if REST > 0:
            squares += tl.sum(rest * rest, 1)
        scale = tl.rsqrt(squares / D + eps)[:, None]
        low *= scale * weight_of(q_weight, k_weight, is_query, i, in_half)
        high *= scale * weight_of(q_weight, k_weight, is_query, HALF + i, in_half)
        if REST > 0:
            rest *= scale * weight_of(q_weight, k_weight, is_query, 2 * HALF + j, j < REST)
    if keys is not None:
        slot = tl.load(out_slots + token, present & ~is_query, other=0)
        place = (slot * K_HEADS + head - Q_HEADS) * D
    if REST > 0:
        store_part(rest, 2 * HALF + j, in_rest, qkv, start, keys, place, is_query)
    angle = token[:, None] * (2 * HALF) + i[None]
    cos_low = tl.load(cos + angle, inside, other=0.0).to(tl.float32)
    sin_low = tl.load(sin + angle, inside, other=0.0).to(tl.float32)
    cos_high = tl.load(cos + angle + HALF, inside, other=0.0).to(tl.float32)
    sin_high = tl.load(sin + angle + HALF, inside, other=0.0).to(tl.float32)
    store_part(low * cos_low - high * sin_low, i, inside, qkv, start, keys, place, is_query)
    store_part(high * cos_high + low * sin_high, HALF + i, inside, qkv, start, keys, place, is_query)
