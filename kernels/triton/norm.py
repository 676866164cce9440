"""RMS norm: a program normalises whole rows, which it reads once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import plans
from .launch import architecture, output


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """:func:`trunkline.kernels.norm.rms_norm_reference` as a Triton kernel.

    float32, bfloat16 or float16; computes in float32. ``out`` may be ``residual`` or ``x``; ValueError unless it is
    contiguous and of ``x``'s shape.
    """
    width = x.shape[-1]
    out, count, plan = output(x, out, width), x.numel() // width, plans.rows(architecture(), width)
    residual = None if residual is None else residual.contiguous()
    norm_kernel[(triton.cdiv(count, plan.block_m),)](
        x.contiguous(), weight.detach(), residual, out, count, eps,
        WIDTH=width, BLOCK_M=plan.block_m, BLOCK_N=plan.block_n, num_warps=plan.warps,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=("count", "eps"))
def norm_kernel(
    x: tl.tensor, weight: tl.tensor, residual: tl.tensor, out: tl.tensor, count: tl.tensor, eps: tl.tensor,
    WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
) -> None:  # fmt: skip
    """Grid (blocks of rows)."""
    row, column = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    at, present = row[:, None] * WIDTH + column[None], (row < count)[:, None] & (column < WIDTH)[None]
    exact = tl.load(x + at, present, other=0.0).to(tl.float32)
    factor = tl.load(weight + column, column < WIDTH, other=0.0).to(tl.float32)
    exact = exact * tl.rsqrt(tl.sum(exact * exact, 1) / WIDTH + eps)[:, None] * factor[None]
    if residual is not None:
        exact += tl.load(residual + at, present, other=0.0).to(tl.float32)
    tl.store(out + at, exact.to(out.dtype.element_ty), present)
