"""Layer norm of rows, fused with the residual addition before it (post-norm encoders)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from trunkline.kernels.cpu import layer_norm as compiled


def layer_norm_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """``(y - mean(y)) / sqrt(var(y) + eps) * weight + bias`` with ``y = x + residual``, over the last dimension.

    ``x``, ``residual`` and ``out`` [T, H] of any float dtype, ``weight`` and ``bias`` [H] -> [T, H] of ``x``'s dtype,
    written to ``out`` if given. Computes in float32, or in float64 for a float64 ``x``.

    Source: Ba, Kiros and Hinton, "Layer Normalization" (2016, arXiv:1607.06450).
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    exact = x.to(wide) if residual is None else x.to(wide) + residual.to(wide)
    result = F.layer_norm(exact, exact.shape[-1:], weight.to(wide), bias.to(wide), eps).to(x.dtype)
    return result if out is None else out.copy_(result)


def layer_norm_cpu(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """:func:`layer_norm_reference`, compiled; returns ``out`` [T, H].

    ``x``, ``residual`` and ``out`` [T, H] are of one dtype, float32 or bfloat16; ``weight`` and ``bias``
    [H] are float32. ``out`` is allocated if None; it may be ``x`` or ``residual``. ValueError for other
    shapes or dtypes, and for tensors that aren't contiguous.
    """
    width = x.shape[1]
    if len(weight) != width or len(bias) != width:
        raise ValueError(f"weight and bias must have x's width {width}, not {len(weight)} and {len(bias)}")
    for name, other in (("residual", residual), ("out", out)):
        if other is not None and other.shape != x.shape:
            raise ValueError(f"{name} must have x's shape {tuple(x.shape)}, not {tuple(other.shape)}")
    out = torch.empty_like(x) if out is None else out
    compiled.layer_norm(x, weight, bias, eps, residual, out)
    return out
