"""Elementwise functions for kernels, in float32: they don't overflow, and pass NaN on.

Only ``exp2`` and ``erf`` are used, which all targets and the interpreter have.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def sigmoid(x: tl.tensor) -> tl.tensor:
    """``1 / (1 + exp(-x))``."""
    small = tl.exp2(-tl.abs(x) * LOG2E)
    return tl.where(x < 0, small, 1.0) / (1.0 + small)


@triton.jit
def soft_cap(x: tl.tensor, cap: tl.tensor) -> tl.tensor:
    """``cap * tanh(x / cap)``."""
    small = tl.exp2(-tl.abs(x) * (2.0 * LOG2E / cap))
    size = cap * (1.0 - small) / (1.0 + small)
    return tl.where(x < 0, -size, size)


@triton.jit
def activation(x: tl.tensor, ACTIVATION: tl.constexpr) -> tl.tensor:
    """The function ``ACTIVATION`` of :data:`trunkline.kernels.activation.ACTIVATIONS`; "gelu" for any other name."""
    if ACTIVATION == "silu":
        result = x * sigmoid(x)
    elif ACTIVATION == "gelu_tanh":
        result = x * sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    else:
        result = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    return result
