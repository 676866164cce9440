"""GELU in its exact form (erf, not tanh): computed for float32, looked up in a table for bfloat16."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from trunkline.kernels.cpu import gelu as compiled


def gelu_reference(x: torch.Tensor) -> torch.Tensor:
    """``x * Φ(x)``, Φ being the standard normal distribution function; any float dtype and shape.

    Source: Hendrycks and Gimpel, "Gaussian Error Linear Units" (2016, arXiv:1606.08415).
    """
    return F.gelu(x)


def gelu(x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """:func:`gelu_reference` of ``x`` [T, N], float32 or bfloat16, compiled; returns ``out`` [T, N].

    The error is at most 1e-6 in float32; bfloat16 results are correctly rounded. ``out`` has ``x``'s
    shape and dtype, and is allocated if None. It may be ``x`` itself, which is several times slower in
    float32. ValueError for another shape of ``out``, another dtype, or tensors that aren't contiguous.
    """
    if out is not None and out.shape != x.shape:
        raise ValueError(f"out must have x's shape {tuple(x.shape)}, not {tuple(out.shape)}")
    out = torch.empty_like(x) if out is None else out
    compiled.gelu(x, out)
    return out
