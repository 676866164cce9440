"""The activation of an MLP, elementwise."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import plans
from .elements import activation as function
from .launch import architecture, output


def activate(x: torch.Tensor, activation: str) -> torch.Tensor:
    """:func:`trunkline.kernels.activation.activate_reference` as a Triton kernel.

    float32, bfloat16 or float16, computed in float32.
    """
    out, count, plan = output(x, None, x.shape[-1]), x.numel(), plans.elements(architecture())
    activation_kernel[(triton.cdiv(count, plan.block_n),)](
        x.contiguous(), out, count, ACTIVATION=activation, BLOCK_N=plan.block_n, num_warps=plan.warps
    )
    return out


@triton.jit(do_not_specialize=("count",))
def activation_kernel(
    x: tl.tensor, out: tl.tensor, count: tl.tensor, ACTIVATION: tl.constexpr, BLOCK_N: tl.constexpr
) -> None:
    """Grid (blocks of elements)."""
    at = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    result = function(tl.load(x + at, at < count, other=0.0).to(tl.float32), ACTIVATION)
    tl.store(out + at, result.to(out.dtype.element_ty), at < count)
