"""The gated activation of an MLP: reads gate and up once, writes their product."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import plans
from .elements import activation as activate
from .launch import architecture, output


def glu(gate_up: torch.Tensor, activation: str, out: torch.Tensor | None = None) -> torch.Tensor:
    """:func:`trunkline.kernels.glu.glu_reference` as a Triton kernel.

    float32, bfloat16 or float16; computes in float32, and rounds once.
    ValueError unless ``out`` is contiguous and of shape [T, I].
    """
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out, plan = output(gate_up, out, width), plans.columns(architecture(), width)
    glu_kernel[triton.cdiv(rows, plan.block_m), triton.cdiv(width, plan.block_n)](
        gate_up.contiguous(), out, rows,
        WIDTH=width, ACTIVATION=activation, BLOCK_M=plan.block_m, BLOCK_N=plan.block_n, num_warps=plan.warps,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=("rows",))
def glu_kernel(
    gate_up: tl.tensor, out: tl.tensor, rows: tl.tensor, WIDTH: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
) -> None:  # fmt: skip
    """Grid (blocks of rows, blocks of columns)."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    present = (row < rows)[:, None] & (column < WIDTH)[None]
    at = gate_up + row[:, None] * (2 * WIDTH) + column[None]
    gate = tl.load(at, present, other=0.0).to(tl.float32)
    up = tl.load(at + WIDTH, present, other=0.0).to(tl.float32)
    result = activate(gate, ACTIVATION) * up
    tl.store(out + row[:, None] * WIDTH + column[None], result.to(out.dtype.element_ty), present)
