"""Layer norm of rows, with what a residual connection adds first."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from trunkline.kernels.cpu import layer_norm as compiled


def layer_norm_reference(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """Mean 0 and variance 1 over the last dimension of ``x + residual``, then ``* weight + bias``; float32 or wider.

    ``x`` and ``residual`` [T, H] of any float dtype, ``weight`` and ``bias`` [H] -> [T, H] of ``x``'s dtype.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    exact = x.to(wide) if residual is None else x.to(wide) + residual.to(wide)
    return F.layer_norm(exact, exact.shape[-1:], weight.to(wide), bias.to(wide), eps).to(x.dtype)


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """:func:`layer_norm_reference`, compiled, for float32 or bfloat16 ``x`` and ``residual``.

    ``weight`` and ``bias`` are float32. ``out``, like ``x``, takes the result; it may be ``x`` or ``residual``.
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
