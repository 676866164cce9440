"""Root mean square normalisation of rows."""

from __future__ import annotations

import torch

from trunkline.kernels.cpu import norm as compiled


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """``x / sqrt(mean(x**2) + eps) * weight`` over the last dimension, in float32 or wider.

    ``x`` [T, H] of any float dtype, ``weight`` [H] -> [T, H] of ``x``'s dtype.
    """
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + eps)
    return (exact * scale * weight).to(x.dtype)


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """:func:`rms_norm_reference`, compiled: ``x`` [T, H] float32 or bfloat16, ``weight`` [H] float32.

    ``residual``, like ``x``, is added; ``out``, like ``x``, takes the result and may be ``residual``.
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
