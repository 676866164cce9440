"""Weights as small integers: codes with scales, and how they are made from the numbers of a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from .subgroups import SUBGROUP, ZERO, Subgroups, expand, subgroup_codes

SMALL_GROUP, LARGE_GROUP = 32, 64  # inputs
MOST_GROUP = 256  # inputs, with 4 bits: weights are off by more than rows, which have the same groups
PIECE = 1 << 19  # numbers of a weight that are quantised at a time: intermediate results stay in a CPU's cache
NARROW = 512  # inputs of a layer up to which int8 has small groups: the fewer are added, the fewer errors cancel out


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """A weight [N, K] as codes from 0 to 2 ** ``bits`` - 1, in groups of neighbouring inputs.

    Its numbers are ``factors[n] * (scales[n, g] * (codes[n, k] - zero) - minima[n, g])``, g the group of k. There is
    either a zero or minima. The rows that it multiplies are quantised in the same groups.

    With ``subgroups`` (and a zero), codes of 4 bits stand for those of 8 bits: groups can be larger than what the same
    scale suits. In a product, integers are cheaper than scales.

    ``order``: column k of the codes belongs to input ``order[k]``, where inputs were sorted before they were grouped.
    """

    bits: int  # 4 or 8
    group: int  # inputs; divides K. A multiple of 32 with 4 bits, of 4 with 8
    codes: torch.Tensor  # uint8 [N, K]
    factors: torch.Tensor  # float32 [N]
    scales: torch.Tensor  # float16 [N, K / group]
    minima: torch.Tensor | None = None  # the same
    zero: int = 0
    order: torch.Tensor | None = None  # int32 [K]; None: column k is input k
    subgroups: Subgroups | None = None

    def numbers(self) -> torch.Tensor:
        """The weight, float32 [N, K]."""
        return dequantize(self.expanded().codes, self.factors, self.scales, self.minima, self.zero, self.order)

    def expanded(self) -> QuantizedWeight:
        """The same numbers without subgroups, as the codes of 8 bits that these stand for."""
        if self.subgroups is None:
            return self
        return replace(self, bits=8, codes=expand(self.codes, self.subgroups), subgroups=None)


def dequantize(
    codes: torch.Tensor,
    factors: torch.Tensor,
    scales: torch.Tensor,
    minima: torch.Tensor | None,
    zero: int,
    order: torch.Tensor | None,
) -> torch.Tensor:
    """The numbers of :class:`QuantizedWeight`, float32 [N, K]."""
    outputs, inputs = codes.shape
    groups = (codes.float() - zero).view(outputs, scales.shape[1], -1) * scales.float()[..., None]
    if minima is not None:
        groups -= minima.float()[..., None]
    numbers = groups.view(outputs, inputs) * factors[:, None]
    if order is None:
        return numbers
    by_input = torch.empty_like(numbers)
    by_input[:, order.long()] = numbers
    return by_input


def quantize_int8(weight: torch.Tensor) -> QuantizedWeight | None:
    """``weight`` [N, K] with 8 bits, and a scale for each group of 64 inputs, or 32 for narrow layers; None if 32
    doesn't divide K.

    Codes are from 1 to 255, and 128 stands for zero: numbers are symmetric about it.
    """
    inputs = weight.shape[1]
    if inputs % SMALL_GROUP:
        return None
    group = _group(8, inputs, inputs)

    def quantized(rows: torch.Tensor) -> QuantizedWeight:
        groups = rows.float().view(len(rows), -1, group)
        scales, factors = _relative(groups.abs().amax(2) / 127)
        codes = _steps(groups, scales, factors).round_().clamp_(-127, 127).add_(128)
        return QuantizedWeight(8, group, codes.to(torch.uint8).view(len(rows), inputs), factors, scales, zero=128)

    return stacked([quantized(rows) for rows in _pieces(weight)])


def quantize_int4(weight: torch.Tensor) -> QuantizedWeight | None:
    """``weight`` [N, K] with 4 bits, and an integer multiplier and offset for each 32 inputs; None if 32 doesn't divide
    K. Groups, which have a scale, have up to 256 inputs.
    """
    inputs = weight.shape[1]
    if inputs % SUBGROUP:
        return None
    group = _group(4, inputs, inputs)

    def quantized(rows: torch.Tensor) -> QuantizedWeight:
        groups = rows.float().view(len(rows), -1, group)
        scales, factors = _relative(groups.abs().amax(2) / 127)
        codes, subgroups = subgroup_codes(_steps(groups, scales, factors).view(len(rows), inputs))
        return QuantizedWeight(4, group, codes, factors, scales, zero=ZERO, subgroups=subgroups)

    return stacked([quantized(rows) for rows in _pieces(weight)])


def grouped(
    bits: int, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, groups: torch.Tensor
) -> QuantizedWeight:
    """The weight ``scales[n, g] * (codes[n, k] - zeros[n, g])``, g = ``groups[k]``.

    ``codes`` uint8 [N, K] of ``bits`` bits, ``scales`` and ``zeros`` float32 [N, G], ``groups`` int64 [K]. Inputs are
    sorted by group, and large groups divided, since the rows that a weight multiplies are quantised in its groups.
    ValueError unless all groups have the same multiple of 32 inputs.
    """
    inputs, counts = codes.shape[1], torch.bincount(groups, minlength=scales.shape[1])
    size = int(counts[0])
    if size == 0 or size % SMALL_GROUP or not bool((counts == size).all()):
        sizes = ", ".join(map(str, sorted(set(counts.tolist()))))
        raise ValueError(f"its groups have {sizes} inputs, not one multiple of {SMALL_GROUP}")
    group = _group(bits, inputs, size)
    order = groups.argsort(stable=True)
    neighbours = torch.equal(order, torch.arange(inputs))
    # Divided by a power of two, float16 and bfloat16 scales keep their bits.
    factors = torch.exp2(torch.frexp(scales.abs().amax(1).clamp_min(1e-30)).exponent.float())
    halves = (scales / factors[:, None]).half()
    zero = int(zeros[0, 0])
    constant = bool((zeros == zero).all())
    minima = None if constant else (halves.float() * zeros).half()
    return QuantizedWeight(
        bits,
        group,
        codes if neighbours else codes[:, order],
        factors,
        halves.repeat_interleave(size // group, 1),
        None if minima is None else minima.repeat_interleave(size // group, 1),
        zero if constant else 0,
        None if neighbours else order.int(),
    )


def stacked(parts: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """Weights [N, K] one below the other. ValueError if the orders of their inputs differ.

    If they differ in bits, groups, subgroups or zeros, the result has the most bits, the smallest groups, and minima.
    """
    first = parts[0]
    if any(not _same(part.order, first.order) for part in parts):
        raise ValueError("their inputs have different orders")
    kinds = {(part.bits, part.group, part.zero, part.minima is None, part.subgroups is None) for part in parts}
    if len(kinds) > 1:
        parts, group = [part.expanded() for part in parts], math.gcd(*(part.group for part in parts))
        bits = max(part.bits for part in parts)
        parts = [_with_minima(part, bits, group) for part in parts]
        first = parts[0]
    minima = [part.minima for part in parts if part.minima is not None]
    subgroups = [part.subgroups for part in parts if part.subgroups is not None]
    return replace(
        first,
        codes=torch.cat([part.codes for part in parts]),
        factors=torch.cat([part.factors for part in parts]),
        scales=torch.cat([part.scales for part in parts]),
        minima=torch.cat(minima) if minima else None,
        subgroups=Subgroups(*map(torch.cat, zip(*subgroups, strict=True))) if subgroups else None,
    )


def _same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    return one is other or (one is not None and other is not None and torch.equal(one, other))


def _with_minima(weight: QuantizedWeight, bits: int, group: int) -> QuantizedWeight:
    """The same numbers with more bits, smaller groups, and minima in place of a zero."""
    repeats = weight.group // group
    minima = weight.scales * weight.zero if weight.minima is None else weight.minima
    scales, minima = (values.repeat_interleave(repeats, 1) for values in (weight.scales, minima))
    return replace(weight, bits=bits, group=group, scales=scales, minima=minima, zero=0)


def _group(bits: int, inputs: int, size: int) -> int:
    """How many of ``size`` inputs, a multiple of 32, a group has in a layer of ``inputs``."""
    if bits == 4:
        return max(group for group in range(SMALL_GROUP, MOST_GROUP + 1, SMALL_GROUP) if size % group == 0)
    return SMALL_GROUP if inputs <= NARROW or size % LARGE_GROUP else LARGE_GROUP


def _pieces(weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Rows of the weight, about :data:`PIECE` numbers each."""
    return torch.split(weight, max(1, PIECE // weight.shape[1]))


def _relative(steps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales float16 [N, groups] and factors [N]: steps divided by an output's largest one, so that float16 has them
    as normal numbers."""
    factors = steps.amax(1).clamp_min(1e-30)
    return (steps / factors[:, None]).half(), factors


def _steps(groups: torch.Tensor, scales: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Numbers [N, groups, group] in units of the scales as they are rounded."""
    return groups / factors[:, None, None] / scales.float().clamp_min(1e-7)[..., None]
