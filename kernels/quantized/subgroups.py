"""Codes of 4 bits that stand for codes of 8 bits, with a multiplier and an offset for each 32 inputs."""

from __future__ import annotations

from typing import NamedTuple

import torch

SUBGROUP = 32  # inputs
LARGEST_CODE = 15
ZERO = 128  # the code of 8 bits that stands for zero


class Subgroups(NamedTuple):
    """A code stands for ``multipliers[n, s] * code + offsets[n, s]``, at most 255, s the subgroup of 32 inputs.

    Both are uint8 [N, K / 32].
    """

    multipliers: torch.Tensor
    offsets: torch.Tensor


def expand(codes: torch.Tensor, subgroups: Subgroups) -> torch.Tensor:
    """The codes of 8 bits for which ``codes`` uint8 [N, K] stand, of the same shape."""
    parts = codes.view(len(codes), -1, SUBGROUP)
    return (parts * subgroups.multipliers[..., None] + subgroups.offsets[..., None]).view_as(codes)


def subgroup_codes(numbers: torch.Tensor) -> tuple[torch.Tensor, Subgroups]:
    """The codes uint8 [N, K] of ``numbers`` from -127 to 127, float32 [N, K].

    Of two multipliers, each subgroup has the one with the smaller error: the smallest that covers its whole range, or
    the next smaller one, which cuts numbers off at both ends and rounds the others less.
    """
    parts = numbers.view(len(numbers), -1, SUBGROUP)
    low, high = parts.amin(2), parts.amax(2)
    covering = ((high - low) / LARGEST_CODE - 1e-3).ceil_().clamp_(1, 255 // LARGEST_CODE)
    one, other = (_encoded(parts, low + high, each) for each in (covering, (covering - 1).clamp_min_(1)))
    better = (_error(parts, *other) < _error(parts, *one))[..., None]
    codes, multipliers, offsets = (torch.where(better, b, a).to(torch.uint8) for a, b in zip(one, other, strict=True))
    return codes.view(numbers.shape), Subgroups(multipliers[..., 0], offsets[..., 0])


def _encoded(
    parts: torch.Tensor, ends: torch.Tensor, multipliers: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, multipliers and offsets (each with three dimensions); ``ends`` is the sum of a subgroup's ends.

    The first offset puts the range in the middle, the second leaves the errors a mean near zero.
    """
    multipliers, ends = multipliers[..., None], ends[..., None]
    width = LARGEST_CODE * multipliers
    offsets = _offsets((ends - width) / 2, width)
    codes = _nearest(parts, multipliers, offsets)
    offsets = _offsets(parts.mean(2, keepdim=True) - multipliers * codes.mean(2, keepdim=True), width)
    return _nearest(parts, multipliers, offsets), multipliers, offsets


def _offsets(shifts: torch.Tensor, width: torch.Tensor) -> torch.Tensor:
    """Integers with which no code stands for more than 255."""
    return torch.minimum((shifts + ZERO).round_().clamp_min_(0), 255 - width)


def _nearest(parts: torch.Tensor, multipliers: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    return (parts + (ZERO - offsets)).div_(multipliers).round_().clamp_(0, LARGEST_CODE)


def _error(parts: torch.Tensor, codes: torch.Tensor, multipliers: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """The squared error of each subgroup [N, K / 32]."""
    return (codes * multipliers).add_(offsets - ZERO).sub_(parts).square_().sum(2)
