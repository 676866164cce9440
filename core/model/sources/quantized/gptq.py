"""GPTQ's tensors, as AutoGPTQ and GPTQModel write them.

``qweight`` int32 [K · bits / 32, N] has neighbouring inputs in one word, ``qzeros`` int32 [G, N · bits / 32]
neighbouring outputs; ``scales`` float16 [G, N]; ``g_idx`` int32 [K] is the group of each input.
"""

from __future__ import annotations

import torch

from trunkline.core.errors import ModelError

from .integers import Integers
from .parts import WORD, Parts, check_groups, unpack

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
    return outputs, inputs


def read(parts: Parts, *, minus_one: bool) -> Integers:
    """``minus_one``: zeros are stored minus one, as in all versions of the format but "gptq_v2".

    GPTQModel subtracts from whole words, where a zero of 0 borrows from the next one.
    """
    bits = _bits(parts)
    codes = unpack(parts[MARK].to(), bits).transpose(1, 2).flatten(0, 1).t()
    zeros = parts["qzeros"].to()
    if minus_one:
        zeros = zeros + sum(1 << place for place in range(0, WORD, bits))
    scales = parts["scales"].to(dtype=torch.float32).t()
    groups = parts["g_idx"].to(dtype=torch.int64) if "g_idx" in parts else None
    check_groups(parts.layer, codes.shape[1], scales.shape[1], groups)
    return Integers(bits, codes.contiguous(), scales, unpack(zeros, bits).flatten(1).t().float(), groups)


def _bits(parts: Parts) -> int:
    """The bits of a code, which may differ between layers."""
    bits = parts.sizes("qzeros")[1] * WORD / parts.sizes(MARK)[1]
    if bits not in BITS:
        raise ModelError(f"{parts.layer} is stored with {bits:g} bits; 4 and 8 can be read.")
    return int(bits)
