"""A weight as integers, with scales and zeros for groups of its inputs, whatever the format of the file."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trunkline.core.model.sources.quantized_tensor import Dequantized
from trunkline.kernels.quantized.weight import QuantizedWeight, grouped


@dataclass(frozen=True, slots=True)
class Integers:
    """A weight [N, K]: ``scales[n, g] * (codes[n, k] - zeros[n, g])``, where g is the group of input k."""

    bits: int
    codes: torch.Tensor  # uint8 [N, K]; or a float8 dtype, without zeros
    scales: torch.Tensor  # float32 [N, G]
    zeros: torch.Tensor | None  # float32 [N, G], whole numbers
    groups: torch.Tensor | None = None  # int64 [K]: of each input; None: K / G neighbours each

    def numbers(self, rows: slice) -> torch.Tensor:
        """Rows ``rows`` of the weight, float32."""
        groups = self._group_of_each_input()
        numbers = self.codes[rows].float()
        if self.zeros is not None:
            numbers -= self.zeros[rows][:, groups]
        return numbers.mul_(self.scales[rows][:, groups])

    def quantized(self) -> QuantizedWeight:
        """The weight for the kernels. Dequantized if they have no such codes or groups."""
        if self.zeros is None:
            raise Dequantized("its numbers are float8")
        try:
            return grouped(self.bits, self.codes, self.scales, self.zeros, self._group_of_each_input())
        except ValueError as error:
            raise Dequantized(str(error)) from error

    def _group_of_each_input(self) -> torch.Tensor:
        inputs, groups = self.codes.shape[1], self.scales.shape[1]
        return torch.arange(inputs) // (inputs // groups) if self.groups is None else self.groups
