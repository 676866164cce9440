"""The activation of an MLP, elementwise."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import plans
from .elements import activation as function
from .launch import architecture, output


def activate(x: torch.Tensor, activation: str, out: torch.Tensor | None = None) -> torch.Tensor:
    """:func:`trunkline.kernels.activation.activate_reference` of ``x`` [..., N] as a Triton kernel.

    float32, bfloat16 or float16; computes in float32.
    """
    width = x.shape[-1]
    out, rows, plan = output(x, out, width), x.numel() // width, plans.columns(architecture(), width)
    activation_kernel[triton.cdiv(rows, plan.block_m), triton.cdiv(width, plan.block_n)](
        x.contiguous(), out, rows,
        WIDTH=width, ACTIVATION=activation, BLOCK_M=plan.block_m, BLOCK_N=plan.block_n, num_warps=plan.warps,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=("rows",))
def activation_kernel(
    x: tl.tensor, out: tl.tensor, rows: tl.tensor, WIDTH: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
) -> None:  # fmt: skip
    """Grid (blocks of rows, blocks of columns)."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    present = (row < rows)[:, None] & (column < WIDTH)[None]
    at = row[:, None] * WIDTH + column[None]
    result = function(tl.load(x + at, present, other=0.0).to(tl.float32), ACTIVATION)
    tl.store(out + at, result.to(out.dtype.element_ty), present)
