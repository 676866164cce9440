"""The tensors of compressed-tensors: integers packed into words, or int8 and float8 numbers as they are.

Packed: ``weight_packed`` int32 [N, K · bits / 32] has the codes of neighbouring inputs, ``weight_shape`` is [N, K].
As they are: ``weight`` int8 or float8 [N, K]. Both have ``weight_scale``, one number, or [N, G], or one for each block;
and, unless codes are symmetric about zero, ``weight_zero_point``, as many integers (mostly packed along N for packed
codes). ``weight_g_idx`` int32 [K] is the group of each input, or -1 for all where it isn't used.
"""

from __future__ import annotations

import torch

from trunkline.core.errors import ModelError

from .integers import Integers
from .parts import WORD, Parts, check_groups, unpack

PACKED, SCALE, ZERO, ORDER = "weight_packed", "weight_scale", "weight_zero_point", "weight_g_idx"
# Scales of inputs and outputs are for rows; rows are quantised with scales of their own.
_OF_ROWS = ("input_scale", "input_zero_point", "output_scale", "output_zero_point")
PARTS = frozenset(("weight", PACKED, SCALE, ZERO, ORDER, "weight_shape", *_OF_ROWS))
FLOATS = (torch.float8_e4m3fn, torch.float8_e5m2)

Block = tuple[int, int]
"""Outputs and inputs that have one scale."""


def sizes(parts: Parts, block: Block | None) -> tuple[int, int]:
    """Outputs N and inputs K. ModelError for tensors that don't fit."""
    outputs, inputs = _packed_sizes(parts) if PACKED in parts else parts.sizes("weight")
    if PACKED not in parts and parts["weight"].dtype not in FLOATS:
        parts.check("weight", (outputs, inputs), dtype=torch.int8)
    if block is not None:
        parts.check(SCALE, (-(-outputs // block[0]), -(-inputs // block[1])))
    else:
        groups = 1 if parts[SCALE].shape in ((), (1,)) else parts.sizes(SCALE)[1]
        parts.check(SCALE, (outputs, groups), (1, 1), (1,), ())
    if ORDER in parts:
        parts.check(ORDER, (inputs,), dtype=torch.int32)
    return outputs, inputs


def read(parts: Parts, block: Block | None) -> Integers:
    outputs, inputs = sizes(parts, block)
    scales = parts[SCALE].to(dtype=torch.float32)
    groups = None
    if block is not None:
        scales, groups = scales[torch.arange(outputs) // block[0]], torch.arange(inputs) // block[1]
    elif scales.numel() == 1:
        scales = scales.reshape(1, 1).expand(outputs, 1)
    if ORDER in parts and not bool(((named := parts[ORDER].to(dtype=torch.int64)) == -1).all()):
        groups = named
    check_groups(parts.layer, inputs, scales.shape[1], groups)
    if PACKED in parts:
        words = parts.sizes(PACKED)[1]
        bits = 4 if words == -(-inputs * 4 // WORD) else 8
        codes = unpack(parts[PACKED].to(), bits).flatten(1)[:, :inputs].contiguous()
        return Integers(bits, codes, scales, _zeros(parts, scales, bits), groups)
    weight = parts["weight"].to()
    if weight.dtype in FLOATS:
        if ZERO in parts and bool(parts[ZERO].to(dtype=torch.float32).any()):
            raise ModelError(f"{parts.layer}.{ZERO} must be 0 for float8 weights.")
        return Integers(8, weight, scales, None, groups)
    return Integers(8, weight.view(torch.uint8) ^ 128, scales, _zeros(parts, scales, 8), groups)


def _zeros(parts: Parts, scales: torch.Tensor, bits: int) -> torch.Tensor:
    """The code that stands for zero, float32, for each scale [N, G]."""
    middle = 1 << bits - 1
    if ZERO not in parts:
        return torch.full_like(scales, middle)
    outputs, groups = scales.shape
    if parts[ZERO].dtype == torch.int32 and PACKED in parts:
        parts.check(ZERO, (-(-outputs * bits // WORD), groups), dtype=torch.int32)
        return unpack(parts[ZERO].to().t(), bits).flatten(1)[:, :outputs].t().float()
    parts.check(ZERO, (outputs, groups), (1, 1), (1,), (), dtype=torch.int8)
    return parts[ZERO].to(dtype=torch.float32).expand(outputs, groups) + middle


def _packed_sizes(parts: Parts) -> tuple[int, int]:
    outputs, words = parts.sizes(PACKED)
    parts.check(PACKED, (outputs, words), dtype=torch.int32)
    given = parts["weight_shape"].dtype
    parts.check("weight_shape", (2,), dtype=torch.int32 if given == torch.int32 else torch.int64)
    shape = parts["weight_shape"].to().tolist()
    if shape[0] != outputs or words not in (-(-shape[1] * bits // WORD) for bits in (4, 8)):
        raise ModelError(
            f"{parts.layer}.{PACKED} is {[outputs, words]} for a weight {shape}; integers of 4 and 8 bits can be read."
        )
    return outputs, int(shape[1])
