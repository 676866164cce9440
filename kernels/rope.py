"""Rotary position embedding of queries and keys.

Fused with their RMS norms where a model has them (Qwen3, Gemma 3), and with the write of keys and values to the pool.
"""

from __future__ import annotations

import torch

from trunkline.kernels.cpu import rope as compiled

from .kv_write import write_cpu, write_reference
from .layout import KVSlots
from .norm import rms_norm_reference


def rope_reference(
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
    """Rotate the first ``q_heads + k_heads`` heads of ``qkv`` [T, heads, D] in place; value heads come after them.

    ``qkv`` is of any float dtype. ``cos`` and ``sin`` [T, R], R <= D even, R being the rotary dimension: the
    first R numbers of a head are rotated in pairs (i, i + R / 2), the others stay (partial rotary). With
    ``q_weight`` and ``k_weight`` [D] float32, each head is RMS-normalised with ``eps`` first.

    With ``kv_slots``, ``qkv`` has as many value heads as key heads; the rotated keys and the values are written to
    their slots of the pool, as :func:`.write_reference` does it. Of tokens with the same slot, any numbers remain in
    it. What the key heads of ``qkv`` are afterwards depends on the backend: they are for its own attention, with
    ``written=True``, which must be causal.

    Source: Su et al., "RoFormer" (2021, arXiv:2104.09864), with the pairs of transformers' ``rotate_half``
    (GPT-NeoX) instead of neighbouring numbers.
    """
    exact = qkv[:, : q_heads + k_heads].to(torch.promote_types(qkv.dtype, torch.float32))
    if q_weight is not None and k_weight is not None:
        normed = [rms_norm_reference(exact[:, :q_heads], q_weight, eps)]
        normed.append(rms_norm_reference(exact[:, q_heads:], k_weight, eps))
        exact = torch.cat(normed, dim=1)
    width = cos.shape[-1]
    rotated = exact[..., :width]
    low, high = rotated.chunk(2, dim=-1)
    rotated = rotated * cos[:, None] + torch.cat([-high, low], dim=-1) * sin[:, None]
    qkv[:, : q_heads + k_heads] = torch.cat([rotated, exact[..., width:]], dim=-1).to(qkv.dtype)
    if kv_slots is not None:
        _, k, v = qkv.split_with_sizes([q_heads, k_heads, k_heads], 1)
        write_reference(k, v, *kv_slots)


def rope_cpu(
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
    """:func:`rope_reference`, compiled: ``qkv``, ``cos`` and ``sin`` of one dtype, float32 or bfloat16.

    With ``kv_slots``, the keys are rotated in ``qkv`` too, where attention over whole prompts reads them.
    ValueError for shapes or dtypes that don't fit, for one of ``q_weight`` and ``k_weight`` without the
    other, and for tensors that aren't contiguous.
    """
    rows, _, width = qkv.shape
    if cos.shape != sin.shape or cos.dtype != qkv.dtype or sin.dtype != qkv.dtype or len(cos) != rows:
        raise ValueError("cos and sin must be [T, R] of qkv's dtype")
    if cos.shape[1] > width or cos.shape[1] % 2:
        raise ValueError("the rotary dimension must be even and at most the head's width")
    if (q_weight is None) != (k_weight is None):
        raise ValueError("give both q_weight and k_weight, or neither")
    if q_weight is not None and k_weight is not None and not len(q_weight) == len(k_weight) == width:
        raise ValueError(f"q_weight and k_weight must have the head's width {width}")
    compiled.rope(qkv, cos, sin, q_heads, k_heads, q_weight, k_weight, eps)
    if kv_slots is not None:
        _, k, v = qkv.split_with_sizes([q_heads, k_heads, k_heads], 1)
        write_cpu(k, v, *kv_slots)
