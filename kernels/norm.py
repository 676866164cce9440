"""RMS norm (root mean square normalisation) of rows."""

from __future__ import annotations

import torch

from trunkline.kernels.cpu import norm as compiled


def rms_norm_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """``x / sqrt(mean(x**2) + eps) * weight + residual`` over the last dimension; written to ``out`` if given.

    ``x``, ``residual`` and ``out`` [..., H] of any float dtype, ``weight`` [H] -> [..., H] of ``x``'s dtype.
    Computes in float32, or in float64 for a float64 ``x``. Rounds once, at the end; transformers' Llama rounds
    before the multiplication by ``weight``, too.

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019, arXiv:1910.07467).
    """
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + eps)
    exact = exact * scale * weight
    result = (exact if residual is None else exact + residual).to(x.dtype)
    return result if out is None else out.copy_(result)


def rms_norm_cpu(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """:func:`rms_norm_reference`, compiled; returns ``out`` [T, H].

    ``x``, ``residual`` and ``out`` [T, H] are of one dtype, float32 or bfloat16; ``weight`` [H] is
    float32. ``out`` is allocated if None; it may be ``residual`` or ``x``. ValueError for other shapes or
    dtypes, and for tensors that aren't contiguous.
    """
    width = x.shape[1]
    if len(weight) != width:
        raise ValueError(f"weight must have x's width {width}, not {len(weight)}")
    for name, other in (("residual", residual), ("out", out)):
        if other is not None and other.shape != x.shape:
            raise ValueError(f"{name} must have x's shape {tuple(x.shape)}, not {tuple(other.shape)}")
    out = torch.empty_like(x) if out is None else out
    compiled.rms_norm(x, weight, eps, residual, out)
    return out
