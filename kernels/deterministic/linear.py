"""The linear layers of the deterministic mode: always our own kernel, which adds in the order of the inputs."""

from __future__ import annotations

import torch

from trunkline.kernels.grouped_linear import GroupedLinear
from trunkline.kernels.linear import PackedLinear


class OrderedLinear(PackedLinear):
    """A :class:`.PackedLinear` whose results for a row don't depend on the other rows, on any CPU."""

    uses_onednn = False


def ordered_experts(weight: torch.Tensor) -> GroupedLinear:
    """Pack ``weight`` [E, O, H], of any strides, on the CPU, float32 or bfloat16.

    The layer's results for a row don't depend on the other rows.
    """
    return GroupedLinear([OrderedLinear(one.contiguous()) for one in weight])
