"""Layer norm: a program adds the residual and normalises whole rows, which it reads once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import plans
from .launch import architecture, output


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """:func:`trunkline.kernels.layer_norm.layer_norm_reference` as a Triton kernel.

    float32, bfloat16 or float16; computes in float32. ``out`` may be ``residual`` or ``x``; ValueError unless it is
    contiguous and of ``x``'s shape.
    """
    width = x.shape[-1]
    out, count, plan = output(x, out, width), x.numel() // width, plans.rows(architecture(), width)
    residual = None if residual is None else residual.contiguous()
    layer_norm_kernel[(triton.cdiv(count, plan.block_m),)](
        x.contiguous(), weight.detach(), bias.detach(), residual, out, count, eps,
        WIDTH=width, BLOCK_M=plan.block_m, BLOCK_N=plan.block_n, num_warps=plan.warps,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=("count", "eps"))
def layer_norm_kernel(
    x: tl.tensor, weight: tl.tensor, bias: tl.tensor, residual: tl.tensor, out: tl.tensor, count: tl.tensor,
    eps: tl.tensor, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
) -> None:  # fmt: skip
    """Grid (blocks of rows)."""
    row, column = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    inside = column < WIDTH
    at, present = row[:, None] * WIDTH + column[None], (row < count)[:, None] & inside[None]
    exact = tl.load(x + at, present, other=0.0).to(tl.float32)
    if residual is not None:
        exact += tl.load(residual + at, present, other=0.0).to(tl.float32)
    centred = tl.where(inside[None], exact - (tl.sum(exact, 1) / WIDTH)[:, None], 0.0)
    centred *= tl.rsqrt(tl.sum(centred * centred, 1) / WIDTH + eps)[:, None]
    factor = tl.load(weight + column, inside, other=0.0).to(tl.float32)
    offset = tl.load(bias + column, inside, other=0.0).to(tl.float32)
    tl.store(out + at, (centred * factor[None] + offset[None]).to(out.dtype.element_ty), present)
