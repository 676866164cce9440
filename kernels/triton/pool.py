"""Pooling: a program reduces some columns of all hidden rows of one sequence."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from trunkline.kernels.pool import check

from . import plans
from .launch import architecture


def pool(hidden: torch.Tensor, starts: torch.Tensor, mode: str) -> torch.Tensor:
    """:func:`trunkline.kernels.pool.pool_reference` as a Triton kernel, with the same errors.

    float32, bfloat16 or float16; computes in float32. ``starts`` may be on the CPU.
    """
    check(hidden, starts, mode)
    rows, width = len(starts) - 1, hidden.shape[1]
    out, plan = hidden.new_empty(rows, width, dtype=torch.float32), plans.pooled(architecture(), width)
    pool_kernel[rows, triton.cdiv(width, plan.block_n)](
        hidden.contiguous(), starts.to(hidden.device), out,
        WIDTH=width, MODE=mode, BLOCK_M=plan.block_m, BLOCK_N=plan.block_n, num_warps=plan.warps,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=("starts",))
def pool_kernel(
    hidden: tl.tensor, starts: tl.tensor, out: tl.tensor, WIDTH: tl.constexpr, MODE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
) -> None:  # fmt: skip
    """Grid (sequences, blocks of columns)."""
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    begin, end, inside = tl.load(starts + row), tl.load(starts + row + 1), column < WIDTH
    if MODE == "first":
        end = begin + 1
    if MODE == "last":
        begin = end - 1
    total = tl.full((BLOCK_N,), -float("inf") if MODE == "max" else 0.0, tl.float32)
    unordered = tl.zeros((BLOCK_N,), tl.int32)
    for start in range(begin, end, BLOCK_M):
        token = start + tl.arange(0, BLOCK_M)
        present = (token < end)[:, None] & inside[None]
        x = tl.load(hidden + token[:, None] * WIDTH + column[None], present, other=0.0).to(tl.float32)
        if MODE == "max":  # of a row with a NaN, it is NaN, which tl.max ignores
            unordered += tl.sum((x != x).to(tl.int32), 0)
            total = tl.maximum(total, tl.max(tl.where(present & (x == x), x, -float("inf")), 0))
        elif MODE == "weighted":
            total += tl.sum(x * (token - begin + 1).to(tl.float32)[:, None], 0)
        else:
            total += tl.sum(x, 0)
    count = (end - begin).to(tl.float32)
    if MODE == "mean":
        total = total / count
    if MODE == "sqrt":
        total = total / tl.sqrt(count)
    if MODE == "weighted":
        total = total / (count * (count + 1) / 2)
    tl.store(out + row * WIDTH + column, tl.where(unordered > 0, float("nan"), total), inside)
