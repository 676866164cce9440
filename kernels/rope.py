"""Rotary position embedding of queries and keys, with their norms where a model has them."""

from __future__ import annotations

import torch

from trunkline.kernels.cpu import rope as compiled

from .norm import rms_norm_reference


def rope_reference(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    queries: int,
    keys: int,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    eps: float = 0.0,
) -> None:
    """Turn the first ``queries + keys`` heads of ``qkv`` [T, heads, D] in place.

    ``cos`` and ``sin`` [T, R], R <= D even: the first R numbers of a head are turned, number i
    together with number i + R / 2. With ``q_weight`` and ``k_weight`` [D] float32, each head is
    RMS-normalised first.
    """
    exact = qkv[:, : queries + keys].to(torch.promote_types(qkv.dtype, torch.float32))
    if q_weight is not None and k_weight is not None:
        normed = [rms_norm_reference(exact[:, :queries], q_weight, eps)]
        normed.append(rms_norm_reference(exact[:, queries:], k_weight, eps))
        exact = torch.cat(normed, dim=1)
    width = cos.shape[-1]
    turned = exact[..., :width]
    low, high = turned.chunk(2, dim=-1)
    turned = turned * cos[:, None] + torch.cat([-high, low], dim=-1) * sin[:, None]
    qkv[:, : queries + keys] = torch.cat([turned, exact[..., width:]], dim=-1).to(qkv.dtype)


def rope(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    queries: int,
    keys: int,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    eps: float = 0.0,
) -> None:
    """:func:`rope_reference`, compiled; all of one dtype, float32 or bfloat16."""
    rows, _, width = qkv.shape
    if cos.shape != sin.shape or cos.dtype != qkv.dtype or sin.dtype != qkv.dtype or len(cos) != rows:
        raise ValueError("cos and sin must be [T, R] of qkv's dtype")
    if cos.shape[1] > width or cos.shape[1] % 2:
        raise ValueError("the rotary width must be even and at most the head's")
    if (q_weight is None) != (k_weight is None):
        raise ValueError("queries and keys are normalised both or not at all")
    if q_weight is not None and k_weight is not None and not len(q_weight) == len(k_weight) == width:
        raise ValueError(f"q_weight and k_weight must have the head's width {width}")
    compiled.rope(qkv, cos, sin, queries, keys, q_weight, k_weight, eps)
