"""The ``cpu`` backend's penalties and biases: a loop over the listed ids of one row after another."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
from numba import njit

from trunkline.kernels.cpu.threads import OPTIONS, Kernel, float32s, float64s, int64s

LARGEST = 1e30  # a finite logit stays finite, whatever it is divided by


class Arguments:
    """What the loop gets: addresses, sizes, the stride of rows in elements; see ``adjust_reference``."""

    logits: int
    stride: int
    count: int
    rows: int
    penalties: int
    starts: int
    ids: int
    counts: int
    bias_starts: int
    bias_ids: int
    biases: int


def _penalise(a: Any, row: int, logits: Any) -> None:
    ids, counts, penalties = int64s(a.ids), float32s(a.counts), float64s(a.penalties)
    frequency, presence, repetition = penalties[3 * row], penalties[3 * row + 1], penalties[3 * row + 2]
    for i in range(int64s(a.starts)[row], int64s(a.starts)[row + 1]):
        before = np.float64(logits[ids[i]])
        x = before - (frequency * np.float64(counts[i]) + presence)
        x = x * repetition if x < 0.0 else x / repetition
        if math.isfinite(before):
            x = min(max(x, -LARGEST), LARGEST)
        logits[ids[i]] = np.float32(x)


penalise = njit(**OPTIONS)(_penalise)


@cache
def kernel() -> Kernel:
    """The compiled loop."""

    def body(a: Any) -> None:
        for row in range(a.count):
            logits = float32s(a.logits + int64s(a.rows)[row] * a.stride * 4)
            penalise(a, row, logits)
            ids, biases = int64s(a.bias_ids), float32s(a.biases)
            for i in range(int64s(a.bias_starts)[row], int64s(a.bias_starts)[row + 1]):
                logits[ids[i]] = logits[ids[i]] + biases[i]

    return Kernel(body, Arguments)
