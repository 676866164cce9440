"""How many tokens are routed to each expert: the sizes of the groups of :mod:`.grouped_linear`."""

from __future__ import annotations

import torch


def expert_counts_reference(ids: torch.Tensor, experts: int) -> torch.Tensor:
    """Count the ids from 0 to ``experts`` - 1 -> int32 [experts]; others aren't counted.

    ``ids`` int64 of any shape: the experts that a router chose, [T, k]. Plain torch, for every device; it reads no
    value on the host, so that it can be part of a CUDA graph.
    """
    # The first and the last of the counters are those of all ids outside of the range.
    counter = ids.reshape(-1).clamp(-1, experts) + 1
    counts = torch.zeros(experts + 2, dtype=torch.int32, device=ids.device)
    counts.scatter_add_(0, counter, torch.ones_like(counter, dtype=torch.int32))
    return counts[1:-1]
