"""The activation of an MLP, elementwise. On CPUs it is compiled; exact GELU (erf) of bfloat16 is a table."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from trunkline.kernels.cpu import gelu as compiled

ACTIVATIONS = ("silu", "gelu_tanh", "gelu")  # "gelu_tanh" is GELU's tanh approximation, "gelu" the exact form


def activate_reference(x: torch.Tensor, activation: str, out: torch.Tensor | None = None) -> torch.Tensor:
    """One of :data:`ACTIVATIONS` of ``x``, of any float dtype and shape. Any other name means "gelu".

    The result is written to ``out`` if given, which may be ``x``.

    Source: Hendrycks and Gimpel, "Gaussian Error Linear Units" (2016, arXiv:1606.08415).
    """
    if activation == "silu":
        result = F.silu(x)
    else:
        result = F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")
    return result if out is None else out.copy_(result)


def activate_cpu(x: torch.Tensor, activation: str, out: torch.Tensor | None = None) -> torch.Tensor:
    """:func:`activate_reference` of ``x`` [T, N], float32 or bfloat16, compiled.

    The error of "gelu" is at most 1e-6 in float32; its bfloat16 results are correctly rounded. ValueError for another
    dtype, for a tensor that isn't contiguous, and for an ``out`` of another shape.
    """
    if out is not None and out.shape != x.shape:
        raise ValueError(f"out must have x's shape {tuple(x.shape)}, not {tuple(out.shape)}")
    out = torch.empty_like(x) if out is None else out
    compiled.activate(x, activation, out)
    return out
