"""GPTQ's tensors, as AutoGPTQ and GPTQModel write them.

``qweight`` int32 [K · bits / 32, N] has neighbouring inputs in one word, ``qzeros`` int32 [G, N · bits / 32]
neighbouring outputs; ``scales`` float16 [G, N]; ``g_idx`` int32 [K] is the group of each input.
"""

from __future__ import annotations

import torch

from trunkline.core.errors import ModelError

from .integers import Integers
from .parts import WORD, Parts, unpack

MARK = "qweight"
PARTS = frozenset((MARK, "qzeros", "scales", "g_idx"))
BITS = (4, 8)


def sizes(parts: Parts) -> tuple[int, int]:
    """Outputs N and inputs K. ModelError for tensors that don't fit."""
    bits, words, outputs = _bits(parts), *parts.sizes(MARK)
    inputs = words * WORD // bits
    groups = parts.sizes("scales")[0]
    parts.check(MARK, (words, outputs), dtype=torch.int32)
    parts.check("scales", (groups, outputs))
    parts.check("qzeros", (groups, outputs * bits // WORD), dtype=torch.int32)
    if "g_idx" in parts:
        parts.check("g_idx", (inputs,), dtype=torch.int32)
    elif inputs % groups:
        raise ModelError(f"{parts.layer} has {inputs} inputs, which {groups} groups don't divide.")
    return outputs, inputs


def read(parts: Parts, *, plus_one: bool) -> Integers:
    """``plus_one``: zeros are stored minus one, as in all versions of the format but "gptq_v2"."""
    bits = _bits(parts)
    codes = unpack(parts[MARK].to(), bits).transpose(1, 2).flatten(0, 1).t()
    zeros = unpack(parts["qzeros"].to(), bits).flatten(1).t()
    if plus_one:
        zeros = zeros + 1 & (1 << bits) - 1  # zero itself is stored as the largest number
    scales = parts["scales"].to(dtype=torch.float32).t()
    groups = parts["g_idx"].to(dtype=torch.int64) if "g_idx" in parts else None
    if groups is not None and not bool(((groups >= 0) & (groups < scales.shape[1])).all()):
        raise ModelError(f"{parts.layer}.g_idx must have groups from 0 to {scales.shape[1] - 1}.")
    return Integers(bits, codes.contiguous(), scales, zeros.float(), groups)


def _bits(parts: Parts) -> int:
    """The bits of a code, which may differ between layers."""
    bits = parts.sizes("qzeros")[1] * WORD / parts.sizes(MARK)[1]
    if bits not in BITS:
        raise ModelError(f"{parts.layer} is stored with {bits:g} bits; 4 and 8 can be read.")
    return int(bits)
