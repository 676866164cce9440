"""The linear layer of the deterministic mode: always our own kernel, which adds in the order of the inputs."""

from __future__ import annotations

from trunkline.kernels.linear import PackedLinear


class OrderedLinear(PackedLinear):
    """A :class:`.PackedLinear` whose results for a row don't depend on the other rows, on any CPU."""

    uses_onednn = False
