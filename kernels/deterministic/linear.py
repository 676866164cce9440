"""The linear layers of the deterministic mode: always our own kernel, which adds in the order of the inputs."""

from __future__ import annotations

import torch
from torch import nn

from trunkline.kernels.linear import PackedLinear


class OrderedLinear(PackedLinear):
    """A :class:`.PackedLinear` whose results for a row don't depend on the other rows, on any CPU."""

    uses_onednn = False


class OrderedExperts(nn.Module):
    """:func:`.grouped_linear_reference` with packed weights; results for a row don't depend on the other rows."""

    def __init__(self, weight: torch.Tensor) -> None:
        """Pack ``weight`` [E, O, H], of any strides, on the CPU, float32 or bfloat16."""
        super().__init__()
        self.layers = nn.ModuleList(OrderedLinear(one.contiguous(), float32_out=True) for one in weight)

    def forward(self, x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        """``x`` [N, H] -> [N, O] of its dtype; group ``e`` ends before row ``ends[e]``, int32 [E]."""
        with torch._C.DisableTorchFunction():  # modules that aren't ours call it, inside of row_invariant
            parts = zip(self.layers, x.tensor_split(ends[:-1].tolist()), strict=True)
            return torch.cat([layer(rows) for layer, rows in parts if len(rows)]).to(x.dtype)
