"""GELU with the exact normal distribution: computed in float32, looked up in bfloat16."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from trunkline.kernels.cpu import gelu as compiled


def gelu_reference(x: torch.Tensor) -> torch.Tensor:
    """``x`` times the probability that a normal number is below it; any float dtype and shape."""
    return F.gelu(x)


def gelu(x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """:func:`gelu_reference` of ``x`` [T, N], compiled: at most 1e-6 off in float32, the nearest number in bfloat16.

    ``out``, like ``x``, takes the result; it may be ``x``, which in float32 is several times slower.
    """
    if out is not None and out.shape != x.shape:
        raise ValueError(f"out must have x's shape {tuple(x.shape)}, not {tuple(out.shape)}")
    out = torch.empty_like(x) if out is None else out
    compiled.gelu(x, out)
    return out
