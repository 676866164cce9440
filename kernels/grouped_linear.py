"""A linear layer of each expert over its own rows: the products of a mixture of experts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .cpu.launches.groups import Groups
from .linear import LinearLayer, PackedLinear

ALIGNMENT = 16  # bytes of which a row's size must be a multiple in grouped_mm


def grouped_linear_reference(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Multiply each group of rows by its own matrix: ``x`` [N, H] -> [N, O].

    ``weight`` is [E, O, H], of ``x``'s dtype and any strides. Group ``e`` is the rows from the end of the group before
    it to ``ends[e]``; ``ends`` is int32 [E], and the last one is N. Groups may be empty.

    It is :func:`torch.nn.functional.grouped_mm` for float32, bfloat16 and float16 and rows of a multiple of 16 bytes.
    Others work on the CPU only, by :func:`grouped_linear_cpu`; else RuntimeError. On a GPU, only its kernel for
    bfloat16 (from sm_80 on) reads no value on the host, so that it can be part of a CUDA graph.
    """
    known = x.dtype in (torch.float32, torch.bfloat16, torch.float16)
    aligned = all(width * x.itemsize % ALIGNMENT == 0 for width in weight.shape[1:])
    if x.is_cpu and not (known and aligned):
        return grouped_linear_cpu(x, weight, ends)
    return F.grouped_mm(x, weight.transpose(1, 2), offs=ends)


def grouped_linear_cpu(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """:func:`grouped_linear_reference` as a loop over the groups: as fast on a CPU, and for every dtype and size."""
    out = x.new_empty(len(x), weight.shape[1])
    start = 0
    for expert, end in enumerate(ends.tolist()):
        if end > start:
            out[start:end] = F.linear(x[start:end], weight[expert])
            start = end
    return out


class GroupedLinear(nn.Module):
    """:func:`grouped_linear_reference` with a linear layer for each group, on a CPU."""

    def __init__(self, layers: Sequence[LinearLayer]) -> None:
        """``layers``: one for each group, of the same sizes."""
        super().__init__()
        self.layers = nn.ModuleList(layers)
        # Products of all groups run together, if their launches are of one kind.
        kinds = {one.launches if one.recordable else 0 for one in layers}
        self._together, self._outputs = len(kinds) == 1 and kinds != {0}, layers[0].out_features
        self._groups: Groups | None = None

    def weight(self, most: int) -> torch.Tensor:
        """The weights of at most the first ``most`` groups, [E, O, H]."""
        layers: Iterable[Any] = self.layers[:most]
        return torch.stack([one.weight(slice(0, one.out_features)) for one in layers])

    def forward(self, x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        """``x`` [N, H] -> [N, O] of its dtype; group ``e`` ends before row ``ends[e]``, int32 [E]."""
        with torch._C.DisableTorchFunction():  # modules that aren't ours call it, inside of row_invariant
            layers: Sequence[Any] = list(self.layers) if self._groups is None else ()
            if not self._together:
                sizes = [end - start for start, end in pairwise([0, *ends.tolist()])]
                groups = torch.split(x, sizes)
                parts = [layer.forward(rows) for layer, rows in zip(layers, groups, strict=True) if len(rows)]
                return torch.cat(parts or [x.new_empty(0, self._outputs)]).to(x.dtype)
            x, out = x.contiguous(), x.new_empty(len(x), self._outputs)
            if self._groups is None:
                self._groups = Groups([layer.forward_into for layer in layers], x, out)
            self._groups.run(x, out, ends)
            return out


def packed_experts(weight: torch.Tensor) -> GroupedLinear:
    """The layer of ``weight`` [E, O, H], of any strides, on the CPU, float32 or bfloat16, with packed weights."""
    return GroupedLinear([PackedLinear(one.contiguous()) for one in weight])
