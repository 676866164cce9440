"""Launches for the compile gate with a defect each, which it must find, and those of sample_launches.py."""

from __future__ import annotations

import sample_kernels
import sample_launches
import torch
import triton
import triton.language as tl
from gate import Expected, Launch
from sample_launches import tensor


@triton.jit
def _specialised(x, out, window, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i) + window)


@triton.jit
def _not_compiling(x, BLOCK: tl.constexpr):
    tl.static_assert(BLOCK > 64, "blocks are larger than 64")


def wide_attention() -> torch.Tensor:
    """Two tiles of 128 × 256 in registers of 4 warps, and in 140 KB of shared memory."""
    pool = tensor(64, 1, 256)
    table, lengths = tensor(2, 32, dtype=torch.int32), tensor(2, dtype=torch.int32)
    return sample_kernels.gather_attention(tensor(2, 8, 256), pool, pool, table, lengths, block_n=128, stages=2)


def unaligned_norm() -> torch.Tensor:
    return sample_kernels.row_norm(tensor(4097)[1:].view(1, 4096), tensor(4097)[1:])


def aligned_norm() -> torch.Tensor:
    return sample_kernels.row_norm(tensor(1, 4096), tensor(4096))


def specialised() -> None:
    for window in (1, 7, 16):
        _specialised[(1,)](tensor(1024), tensor(1024), window, BLOCK=1024)


def launches(target: str) -> list[Launch]:
    """All of them for sm_90; for others, those with limits or instructions of their own."""
    norm = {"_row_norm": Expected()}
    good = sample_launches.launches(target)
    everywhere = [
        Launch("registers", (wide_attention,), {"_gather_attention": Expected()}),
        Launch("tensor cores", (aligned_norm,), {"_row_norm": Expected(tensor_cores="HGMMA|MFMA")}),
    ]
    if target != "sm_90":
        return [*good[:1], *everywhere]
    return [
        *good,
        *everywhere,
        Launch("alignment", (unaligned_norm,), norm),
        Launch("occupancy", (aligned_norm,), {"_row_norm": Expected(registers=16)}),
        Launch("variants", (specialised,), {"_specialised": Expected()}),
        Launch("unnamed", (aligned_norm,), {}),
        Launch("absent", (aligned_norm,), {**norm, "_combine": Expected()}),
        Launch("error", (lambda: _not_compiling[(1,)](tensor(4), BLOCK=32),), {"_not_compiling": Expected()}),
    ]
