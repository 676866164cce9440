"""The ``cpu`` backend's log-probabilities: compiled loops over one row of logits after another.

A row is read three times while the cache holds it: for its largest logit, for the sum of exponentials, and for the
most likely ids. Values of the chosen id, of the most likely ids and of the asked-for ids come from one function, so
that an id has the same bits wherever it stands.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import njit

from trunkline.kernels.cpu.exponential import LOOPS
from trunkline.kernels.cpu.threads import OPTIONS, Kernel, float32s, float64s, int32s, int64s, thread, threads

from .sample import largest, weigh

BLOCK = 512  # logits whose exponentials are kept at a time
COLDEST = 1e30  # temperatures above it are as flat, and don't turn -inf into NaN
LOWEST = np.float32(-3.4028234663852886e38)
_NAN, _ZERO = np.float32(np.nan), np.float32(0.0)


class Arguments:
    """What the loop gets: addresses and sizes."""

    logits: int
    vocabulary: int
    count: int  # rows that are asked about
    rows: int
    temperature: int
    chosen: int
    top: int  # most likely ids of a row
    asked: int  # asked-for ids of a row
    ids: int
    chosen_result: int
    top_ids: int
    top_result: int
    ids_result: int
    scratch: int
    shares: int  # threads


def _sum(values: Any, n: int) -> Any:
    total = _ZERO
    for i in range(n):
        total += values[i]
    return total


block_sum = njit(**LOOPS)(_sum)


def _mass(logits: int, n: int, top: Any, heat: float, scratch: int) -> Any:
    """The sum of ``exp((logit - top) / heat)``: float32 inside a block, float64 over the blocks."""
    total = 0.0
    for first in range(0, n, BLOCK):
        size = min(BLOCK, n - first)
        weigh(float32s(logits + 4 * first), size, top, heat, scratch)
        total += np.float64(block_sum(float32s(scratch), size))
    return total


mass = njit(**OPTIONS)(_mass)


def _above(logits: Any, n: int, bound: Any) -> Any:
    """How many are larger than ``bound``."""
    count = np.int32(0)
    for i in range(n):
        count += np.int32(logits[i] > bound)
    return count


above = njit(**OPTIONS)(_above)


def _rank(logits: int, n: int, k: int, ids: Any, values: Any) -> None:
    """The ``k`` largest logits and their ids, largest first, of equals the lower id first.

    Once there are k, only blocks are looked into that hold a logit above the last of them.
    """
    count = 0
    for first in range(0, n, BLOCK):
        block, size = float32s(logits + 4 * first), min(BLOCK, n - first)
        if count == k and above(block, size, values[k - 1]) == 0:
            continue
        for i in range(size):
            x = block[i]
            if count == k and not x > values[k - 1]:
                continue
            count = min(count + 1, k)
            place = count - 1
            while place > 0 and x > values[place - 1]:
                values[place], ids[place] = values[place - 1], ids[place - 1]
                place -= 1
            values[place], ids[place] = x, np.int32(first + i)


rank = njit(**OPTIONS)(_rank)


def _value(x: Any, top: Any, heat: float, log_mass: float, scaled: Any) -> Any:
    value = np.float32((np.float64(x) - np.float64(top)) / heat - log_mass)
    return max(value, LOWEST) if scaled else value


value_of = njit(**OPTIONS)(_value)


def _row(a: Any, q: int, scratch: int) -> None:
    n = a.vocabulary
    logits = a.logits + int64s(a.rows)[q] * n * 4
    x, heat, chosen = float32s(logits), float64s(a.temperature)[q], int64s(a.chosen)[q]
    top_ids, top_values = int32s(a.top_ids + 4 * q * a.top), float32s(a.top_result + 4 * q * a.top)
    ids, id_values = int64s(a.ids + 8 * q * a.asked), float32s(a.ids_result + 4 * q * a.asked)
    top, _, broken = largest(logits, n)
    if broken:
        float32s(a.chosen_result)[q] = _NAN
        for i in range(a.top):
            top_ids[i], top_values[i] = np.int32(i), _NAN
        for i in range(a.asked):
            id_values[i] = _NAN
        return
    scaled = heat > 0.0
    heat = min(heat, COLDEST) if scaled else 1.0
    log_mass = np.log(mass(logits, n, top, heat, scratch))
    float32s(a.chosen_result)[q] = value_of(x[chosen], top, heat, log_mass, scaled) if 0 <= chosen < n else _NAN
    if a.top > 0:
        rank(logits, n, a.top, top_ids, top_values)
    for i in range(a.top):
        top_values[i] = value_of(top_values[i], top, heat, log_mass, scaled)
    for i in range(a.asked):
        id_values[i] = value_of(x[ids[i]], top, heat, log_mass, scaled) if 0 <= ids[i] < n else _NAN


row_of = njit(**OPTIONS)(_row)


@cache
def kernel() -> Kernel:
    """The compiled loop over rows."""

    def body(a: Any) -> None:
        for share in range(thread(), a.shares, threads()):
            for q in range(share, a.count, a.shares):
                row_of(a, q, a.scratch + 4 * share * BLOCK)

    return Kernel(body, Arguments)
