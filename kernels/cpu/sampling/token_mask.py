"""The ``cpu`` backend's masks of allowed tokens: a loop over the words of one row after another."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import njit

from trunkline.kernels.cpu.threads import OPTIONS, Kernel, float32s, int32s, int64s

_FORBIDDEN = np.float32(-np.inf)
_ALL, _NONE, _BIT = np.int32(-1), np.int32(0), np.int32(1)


class Arguments:
    """What the loop gets: addresses, sizes, the stride of rows of logits in elements; see ``mask_tokens_reference``."""

    logits: int
    stride: int
    vocabulary: int
    count: int
    rows: int
    masks: int
    words: int  # per row


def _mask_word(logits: Any, start: int, size: int, word: Any) -> None:
    """Forbid those of the ``size`` ids from ``start`` on whose bit isn't set."""
    for bit in range(size):
        allowed = (word >> np.int32(bit)) & _BIT
        logits[start + bit] = logits[start + bit] if allowed != _NONE else _FORBIDDEN


mask_word = njit(**OPTIONS)(_mask_word)


@cache
def kernel() -> Kernel:
    """The compiled loop."""

    def body(a: Any) -> None:
        for item in range(a.count):
            logits = float32s(a.logits + int64s(a.rows)[item] * a.stride * 4)
            masks = int32s(a.masks + item * a.words * 4)
            whole = a.vocabulary // 32
            for index in range(whole):
                if masks[index] != _ALL:
                    mask_word(logits, index * 32, 32, masks[index])
            if whole * 32 < a.vocabulary:
                mask_word(logits, whole * 32, a.vocabulary - whole * 32, masks[whole])

    return Kernel(body, Arguments)
