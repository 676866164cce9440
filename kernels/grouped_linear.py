"""A linear layer of each expert over its own rows: the products of a mixture of experts."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def grouped_linear_reference(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Multiply each group of rows by its own matrix: ``x`` [N, H] -> [N, O].

    ``weight`` is [E, O, H], of ``x``'s dtype and any strides. Group ``e`` is the rows from the end of the group before
    it to ``ends[e]``; ``ends`` is int32 [E], and the last one is N. Groups may be empty. Reads no value on the host.
    RuntimeError for dtypes other than float32, bfloat16 and float16, and for rows of a size that isn't a multiple of
    16 bytes.
    """
    return F.grouped_mm(x, weight.transpose(1, 2), offs=ends)


def grouped_linear(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """:func:`grouped_linear_reference`, with the same arguments and result.

    On the CPU a loop over the groups, which is as fast and takes every dtype and size.
    """
    if not x.is_cpu:
        return grouped_linear_reference(x, weight, ends)
    out = x.new_empty(len(x), weight.shape[1])
    start = 0
    for expert, end in enumerate(ends.tolist()):
        if end > start:
            out[start:end] = F.linear(x[start:end], weight[expert])
            start = end
    return out
