"""The tensors of compressed-tensors: integers packed into words, or int8 and float8 numbers as they are.

Packed: ``weight_packed`` int32 [N, K · bits / 32] has the codes of neighbouring inputs, ``weight_shape`` is [N, K].
As they are: ``weight`` int8 or float8 [N, K]. Both have ``weight_scale``, one number, or [N, G], or for float8 one for
each block; and, unless codes are symmetric about zero, ``weight_zero_point``, as many integers (packed along N for
packed codes). ``weight_g_idx`` int32 [K] is the group of each input, or -1 where it isn't used.
"""

from __future__ import annotations

import torch

from trunkline.core.errors import ModelError

from .integers import Integers
from .parts import WORD, Parts, unpack

PACKED, SCALE = "weight_packed", "weight_scale"
_PARTS = ("packed", "scale", "shape", "zero_point", "g_idx")
# Those of "input" and "output" are scales of rows, which get their own here.
PARTS = frozenset({"weight"} | {f"{of}_{part}" for of in ("weight", "input", "output") for part in _PARTS})
FLOATS = (torch.float8_e4m3fn, torch.float8_e5m2)


def sizes(parts: Parts, block: tuple[int, int] | None) -> tuple[int, int]:
    """Outputs N and inputs K. ModelError for tensors that don't fit. ``block``: outputs and inputs with one scale."""
    if PACKED in parts:
        outputs, words = parts.sizes(PACKED)
        parts.check(PACKED, (outputs, words), dtype=torch.int32)
        inputs = _packed_inputs(parts)
    else:
        outputs, inputs = parts.sizes("weight")
        if parts["weight"].dtype not in (torch.int8, *FLOATS):
            parts.check("weight", (outputs, inputs), dtype=torch.int8)
    groups = 1 if parts[SCALE].shape in ((), (1,)) else parts.sizes(SCALE)[1]
    if block is not None:
        parts.check(SCALE, (-(-outputs // block[0]), -(-inputs // block[1])))
    else:
        parts.check(SCALE, (outputs, groups), (1, 1), (1,), ())
        if "weight_g_idx" not in parts and inputs % groups:
            raise ModelError(f"{parts.layer} has {inputs} inputs, which {groups} groups don't divide.")
    if PACKED in parts and "weight_zero_point" in parts:
        parts.check("weight_zero_point", (-(-outputs * _bits(parts) // WORD), groups), dtype=torch.int32)
    elif "weight_zero_point" in parts:
        parts.check("weight_zero_point", tuple(parts[SCALE].shape), dtype=parts["weight"].dtype)
    if "weight_g_idx" in parts:
        parts.check("weight_g_idx", (inputs,), dtype=torch.int32)
    return outputs, inputs


def read(parts: Parts, block: tuple[int, int] | None) -> Integers:
    outputs, inputs = sizes(parts, block)
    scales = parts[SCALE].to(dtype=torch.float32)
    groups = None
    if block is not None:
        scales = scales.repeat_interleave(block[0], 0)[:outputs]
        groups = torch.arange(inputs) // block[1]
    elif scales.numel() == 1:
        scales = scales.reshape(1, 1).expand(outputs, 1)
    if "weight_g_idx" in parts and int((named := parts["weight_g_idx"].to(dtype=torch.int64)).min()) >= 0:
        groups = named
        if int(groups.max()) >= scales.shape[1]:
            raise ModelError(f"{parts.layer}.weight_g_idx must have groups from 0 to {scales.shape[1] - 1}.")
    zero = parts.get("weight_zero_point")
    if PACKED in parts:
        bits = _bits(parts)
        codes = unpack(parts[PACKED].to(), bits).flatten(1)[:, :inputs]
        middle = torch.full_like(scales, 1 << bits - 1)
        zeros = middle if zero is None else unpack(zero.to().t(), bits).flatten(1)[:, :outputs].t().float()
        return Integers(bits, codes.contiguous(), scales, zeros, groups)
    weight = parts["weight"].to()
    if weight.dtype in FLOATS:
        return Integers(8, weight, scales, None, groups)
    zeros = torch.full_like(scales, 128) if zero is None else zero.to(dtype=torch.float32).expand(scales.shape) + 128
    return Integers(8, weight.view(torch.uint8) ^ 128, scales, zeros, groups)


def _packed_inputs(parts: Parts) -> int:
    outputs, words = parts.sizes(PACKED)
    parts.check("weight_shape", (2,), dtype=torch.int64)
    shape = parts["weight_shape"].to().tolist()
    if shape[0] != outputs or words not in (-(-shape[1] * bits // WORD) for bits in (4, 8)):
        raise ModelError(
            f"{parts.layer}.{PACKED} is {[outputs, words]} for a weight {shape}; integers of 4 and 8 bits can be read."
        )
    return int(shape[1])


def _bits(parts: Parts) -> int:
    """The bits of a packed code."""
    return 4 if parts.sizes(PACKED)[1] == -(-_packed_inputs(parts) * 4 // WORD) else 8
