"""Weights as small integers: codes with scales, and how they are made from the numbers of a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

SMALL_GROUP, LARGE_GROUP = 32, 64  # inputs
PIECE = 1 << 22  # numbers of a weight that are quantised at a time
NARROW = 512  # inputs of a layer up to which int8 has small groups: the fewer are added, the fewer errors cancel out


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """A weight [N, K] as codes from 0 to 2 ** ``bits`` - 1, in groups of neighbouring inputs.

    Its numbers are ``factors[n] * (scales[n, g] * (codes[n, k] - zero) - minima[n, g])``, g the group of k. There is
    either a zero or minima. The rows that it multiplies are quantised in the same groups.
    """

    bits: int  # 4 or 8
    group: int  # inputs; divides K. A multiple of 32 with 4 bits, of 4 with 8
    codes: torch.Tensor  # uint8 [N, K]
    factors: torch.Tensor  # float32 [N]
    scales: torch.Tensor  # float16 [N, K / group]
    minima: torch.Tensor | None = None  # the same
    zero: int = 0

    def numbers(self) -> torch.Tensor:
        """The weight, float32 [N, K]."""
        return dequantize(self.codes, self.factors, self.scales, self.minima, self.zero)


def dequantize(
    codes: torch.Tensor, factors: torch.Tensor, scales: torch.Tensor, minima: torch.Tensor | None, zero: int
) -> torch.Tensor:
    """The numbers of :class:`QuantizedWeight`, float32 [N, K]."""
    outputs, inputs = codes.shape
    groups = (codes.float() - zero).view(outputs, scales.shape[1], -1) * scales.float()[..., None]
    if minima is not None:
        groups -= minima.float()[..., None]
    return groups.view(outputs, inputs) * factors[:, None]


def quantize_int8(weight: torch.Tensor) -> QuantizedWeight | None:
    """``weight`` [N, K] with 8 bits, and a scale for each group of 64 inputs, or 32 for narrow layers; None if 32
    doesn't divide K.

    Codes are from 1 to 255, and 128 stands for zero: numbers are symmetric about it.
    """
    inputs = weight.shape[1]
    if inputs % SMALL_GROUP:
        return None
    group = SMALL_GROUP if inputs <= NARROW or inputs % LARGE_GROUP else LARGE_GROUP

    def quantized(rows: torch.Tensor) -> QuantizedWeight:
        groups = rows.float().view(len(rows), -1, group)
        scales, factors = _relative(groups.abs().amax(2) / 127)
        codes = _codes(groups, scales, factors, 0.0).clamp_(-127, 127).add_(128)
        return QuantizedWeight(8, group, codes.to(torch.uint8).view(len(rows), inputs), factors, scales, zero=128)

    return stacked([quantized(rows) for rows in _pieces(weight)])


def quantize_int4(weight: torch.Tensor, group: int = SMALL_GROUP) -> QuantizedWeight | None:
    """``weight`` [N, K] with 4 bits, and a scale and a minimum for each ``group`` of inputs; None if it doesn't divide
    K. Each group's range includes zero.
    """
    inputs = weight.shape[1]
    if inputs % group:
        return None

    def quantized(rows: torch.Tensor) -> QuantizedWeight:
        groups = rows.float().view(len(rows), -1, group)
        low, high = groups.amin(2).clamp_max(0), groups.amax(2).clamp_min(0)
        scales, factors = _relative((high - low) / 15)
        minima = (-low / factors[:, None]).half()
        codes = _codes(groups, scales, factors, minima.float()[..., None]).clamp_(0, 15)
        return QuantizedWeight(4, group, codes.to(torch.uint8).view(len(rows), inputs), factors, scales, minima)

    return stacked([quantized(rows) for rows in _pieces(weight)])


def stacked(parts: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """Weights with the same bits, groups and zero, one below the other."""
    first = parts[0]
    minima = [part.minima for part in parts if part.minima is not None]
    return replace(
        first,
        codes=torch.cat([part.codes for part in parts]),
        factors=torch.cat([part.factors for part in parts]),
        scales=torch.cat([part.scales for part in parts]),
        minima=torch.cat(minima) if minima else None,
    )


def _pieces(weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Rows of the weight, to bound the memory for float32 numbers."""
    return torch.split(weight, max(1, PIECE // weight.shape[1]))


def _relative(steps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales float16 [N, groups] and factors [N]: steps divided by an output's largest one, so that float16 has them
    as normal numbers."""
    factors = steps.amax(1).clamp_min(1e-30)
    return (steps / factors[:, None]).half(), factors


def _codes(
    groups: torch.Tensor, scales: torch.Tensor, factors: torch.Tensor, shift: torch.Tensor | float
) -> torch.Tensor:
    """The nearest steps, with the scales as they are rounded."""
    return ((groups / factors[:, None, None] + shift) / scales.float().clamp_min(1e-7)[..., None]).round_()
