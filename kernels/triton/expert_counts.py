"""How many tokens are routed to each expert: a program counts a block of ids, and adds its counts to all others'."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import power_of_two

BLOCK = 1024  # ids


def expert_counts(ids: torch.Tensor, experts: int) -> torch.Tensor:
    """:func:`trunkline.kernels.expert_counts.expert_counts_reference` as a Triton kernel."""
    counts, total = torch.zeros(experts, dtype=torch.int32, device=ids.device), ids.numel()
    count_kernel[(triton.cdiv(total, BLOCK),)](
        ids.contiguous(), counts, total, EXPERTS=experts, BINS=power_of_two(experts), BLOCK=BLOCK
    )
    return counts


@triton.jit(do_not_specialize=("total",))
def count_kernel(
    ids: tl.tensor, counts: tl.tensor, total: tl.tensor, EXPERTS: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr
) -> None:
    """Grid (blocks of ids). ``counts`` [EXPERTS] are zero before."""
    at, expert = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, BINS)
    chosen = tl.load(ids + at, at < total, other=-1)
    inside = (chosen >= 0) & (chosen < EXPERTS)
    found = tl.histogram(tl.where(inside, chosen, 0).to(tl.int32), BINS, inside)
    tl.atomic_add(counts + expert, found, (expert < EXPERTS) & (found > 0), sem="relaxed")
