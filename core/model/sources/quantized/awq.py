"""AWQ's tensors in its version "gemm", as AutoAWQ writes them.

``qweight`` int32 [K, N / 8] and ``qzeros`` int32 [G, N / 8] have the codes of eight neighbouring outputs in one word,
in the order of :data:`PLACES`; ``scales`` float16 [G, N].
"""

from __future__ import annotations

import torch

from .integers import Integers
from .parts import Parts, check_groups, unpack

MARK = "qweight"
PARTS = frozenset((MARK, "qzeros", "scales"))
BITS = 4
PLACES = [0, 4, 1, 5, 2, 6, 3, 7]  # of the eight outputs in a word, from the lowest bits


def sizes(parts: Parts) -> tuple[int, int]:
    """Outputs N and inputs K. ModelError for tensors that don't fit."""
    inputs, words = parts.sizes(MARK)
    outputs, groups = words * len(PLACES), parts.sizes("scales")[0]
    parts.check(MARK, (inputs, words), dtype=torch.int32)
    parts.check("scales", (groups, outputs))
    parts.check("qzeros", (groups, words), dtype=torch.int32)
    check_groups(parts.layer, inputs, groups, None)
    return outputs, inputs


def read(parts: Parts) -> Integers:
    codes, zeros = (unpack(parts[part].to(), BITS)[..., PLACES].flatten(1).t() for part in (MARK, "qzeros"))
    scales = parts["scales"].to(dtype=torch.float32).t()
    return Integers(BITS, codes.contiguous(), scales, zeros.float())
