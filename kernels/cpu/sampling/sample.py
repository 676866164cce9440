"""The ``cpu`` backend's sampler: compiled loops over one row of logits after another.

top-k and top-p keep a prefix of the tokens ordered by weight. Its end is found as radix selection
finds a rank: histograms of the weights' bits, eleven at a time, with counts and masses. That is
exact, and linear in the vocabulary. The draw is an exponential race: the token with the smallest
-log(u) / weight wins, u being its noise. -log(1 - v) >= v, so the logarithm is needed only for the
few tokens with v < best * weight.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
from numba import njit

from trunkline.kernels.cpu.exponential import HALF, LEAST, LOG2E, power_of_two
from trunkline.kernels.cpu.threads import OPTIONS, Task, float32s, float64s, int32s, int64s, thread, threads

BINS = 2048
BATCH = 256  # tokens whose noise is computed at a time
SCRATCH = BATCH + 4 * BINS + 2  # float32 a thread beside the weights: noise, counts, masses, alignment
_LOOPS: dict[str, Any] = {"fastmath": {"contract", "nsz", "afn"}, **OPTIONS}

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64
_MIX_A = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_B = -7723592293110705685  # 0x94D049BB133111EB


class Arguments:
    """What the loop gets: addresses, sizes, strides in elements."""

    logits: int
    rows: int
    vocabulary: int
    result: int
    scratch: int
    shares: int  # threads
    temperature: int
    top_p: int
    min_p: int
    top_k: int
    seed: int
    position: int


_ZERO = np.float32(0.0)
_MIX_1, _MIX_2 = np.uint32(0x21F0AAAD), np.uint32(0xD35A2D97)
_15, _16 = np.uint32(15), np.uint32(16)
_BELOW_ONE, _STEP = np.float32(2147483392.0), np.float32(2.0**-31)


def splitmix(x: Any) -> Any:
    """splitmix64 on int64 (tensor or scalar), whose products wrap as unsigned ones do."""
    x = x + _GOLDEN
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * _MIX_A
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * _MIX_B
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


_splitmix = njit(**OPTIONS)(splitmix)


def _mix(x: Any) -> Any:
    """A bijective 32-bit mixer with low bias."""
    x = np.uint32((x ^ (x >> _16)) * _MIX_1)
    x = np.uint32((x ^ (x >> _15)) * _MIX_2)
    return np.uint32(x ^ (x >> _15))


mix = njit(**OPTIONS)(_mix)


def _noise(key: int, first: int, n: int, result: Any) -> None:
    """Uniform noise of the tokens ``first`` to ``first + n``; equals ``sample.noise``."""
    low, high = np.uint32(key & 0xFFFFFFFF), np.uint32((key >> 32) & 0xFFFFFFFF)
    for i in range(n):
        mixed = mix(np.uint32(mix(np.uint32(np.uint32(first + i) + low)) + high))
        whole = np.float32(np.int32(mixed >> np.uint32(1)))
        result[i] = (min(whole, _BELOW_ONE) + HALF) * _STEP


noise = njit(**OPTIONS)(_noise)


def _largest(logits: int, n: int) -> Any:
    """Largest of n float32 (as float), and whether any is NaN or +inf, or all are -inf.

    On bits: as signed integers the non-negative floats are in order; the others are once flipped.
    """
    bits, top, bad = int32s(logits), np.int32(-2147483648), np.int32(0)
    for i in range(n):
        x = bits[i]
        flipped = x ^ ((x >> np.int32(31)) & np.int32(0x7FFFFFFF))
        top = max(top, flipped)
        bad |= np.int32((x & np.int32(0x7FFFFFFF)) > np.int32(0x7F800000))
    value, found = float32s(logits), _ZERO
    best = -1
    for i in range(n):
        x = bits[i]
        if (x ^ ((x >> np.int32(31)) & np.int32(0x7FFFFFFF))) == top:
            found, best = value[i], i
            break
    broken = bad != 0 or top == np.int32(0x7F800000) or best < 0 or math.isinf(found)
    for i in range(best):  # 0.0 is above -0.0 here; the first of equals counts
        if value[i] == found:
            best = i
            break
    return found, best, broken


largest = njit(**OPTIONS)(_largest)


def _weigh(logits: Any, n: int, top: Any, heat: Any, weights: int) -> None:
    """``weights[i] = exp((logits[i] - top) / heat)``, 0 below 2**-126. No libm, so that it vectorises."""
    w, bits = float32s(weights), int32s(weights)
    scale = np.float32(LOG2E / heat)
    for i in range(n):
        raw = (logits[i] - top) * scale
        t = max(raw, LEAST)
        whole = np.floor(t + HALF)
        f = t - whole
        w[i] = power_of_two(f)
        power = np.int32(whole) << np.int32(23)
        bits[i] = (bits[i] + power) if raw > LEAST else np.int32(0)


weigh = njit(**_LOOPS)(_weigh)


def _level(bits: Any, w: Any, n: int, prefix: int, shift: int, count: Any, mass: Any) -> None:
    """Counts and masses by eleven bits of the weights, of those that agree with ``prefix`` above them."""
    for b in range(BINS):
        count[b] = 0.0
        mass[b] = 0.0
    for i in range(n):
        x = np.int64(bits[i]) >> shift
        if x >> 11 == prefix:
            count[x & 2047] += 1.0
            mass[x & 2047] += w[i]


level = njit(**OPTIONS)(_level)


def _cutoff(weights: int, n: int, k: float, p: float, count: Any, mass: Any) -> Any:
    """The least weight (its bits) that top-k and top-p keep, and how many of that very weight.

    A token is kept iff fewer than k tokens and a mass below ``p`` times all stand before it.
    Weights have 32 bits, the sign is 0: shifts 22, 11 and 0 cover them.
    """
    bits, w = int32s(weights), float32s(weights)
    prefix, before, held, limit = np.int64(0), 0.0, 0.0, 0.0
    for step in range(3):
        level(bits, w, n, prefix, 22 - 11 * step, count, mass)
        if step == 0:
            for b in range(BINS):
                limit += mass[b]
            limit *= p
        inside = -1
        for b in range(BINS - 1, -1, -1):
            if count[b] > 0.0:
                inside = b
                if before + count[b] >= k or held + mass[b] >= limit:
                    break
                before += count[b]
                held += mass[b]
                inside = -1
        if inside < 0:
            return np.int64(prefix << (33 - 11 * step)), n  # rounding: the limit lies behind the last token
        prefix = (prefix << 11) | inside
    each = mass[prefix & 2047] / count[prefix & 2047]
    equal = min(k - before, math.ceil((limit - held) / each)) if each > 0.0 else k - before
    return prefix, max(np.int64(equal), 1)


cutoff = njit(**OPTIONS)(_cutoff)


def _drop(weights: int, n: int, least: int, equal: int) -> None:
    """Zero the weights below ``least`` (as bits), and of the equal ones all but the first ``equal``."""
    bits = int32s(weights)
    bound = np.int32(least)
    for i in range(n):
        bits[i] = bits[i] if bits[i] >= bound else np.int32(0)
    if equal < n:
        for i in range(n):
            if bits[i] == bound:
                if equal <= 0:
                    bits[i] = 0
                equal -= 1


drop = njit(**OPTIONS)(_drop)


def _race(weights: int, n: int, key: int, buffer: Any) -> Any:
    """The token with the smallest -log(1 - noise) / weight."""
    w, bits, best, winner = float32s(weights), int32s(weights), np.inf, -1
    for first in range(0, n, BATCH):
        size, alive = min(BATCH, n - first), np.int32(0)
        for i in range(size):
            alive |= bits[first + i]
        if alive == 0:
            continue
        noise(key, first, size, buffer)
        bound = np.float32(best * 1.000001)
        for i in range(size):
            if w[first + i] > _ZERO and buffer[i] <= bound * w[first + i]:
                wait = -math.log1p(-np.float64(buffer[i])) / np.float64(w[first + i])
                if wait < best:
                    best, winner = wait, first + i
                    bound = np.float32(best * 1.000001)
    return winner


race = njit(**OPTIONS)(_race)


def _row(a: Any, row: int, weights: int) -> Any:
    n, logits = a.vocabulary, a.logits + row * a.vocabulary * 4
    top, best, broken = largest(logits, n)
    if broken:
        return -1
    heat, k = float64s(a.temperature)[row], int64s(a.top_k)[row]
    if heat <= 0.0 or k == 1:
        return best
    weigh(float32s(logits), n, top, heat, weights)
    p, least = float64s(a.top_p)[row], float64s(a.min_p)[row]
    tables = weights + ((n + 1) // 2 * 2) * 4
    if (1 <= k < n) or p < 1.0:
        bound, equal = cutoff(weights, n, float(k if k >= 1 else n), p, float64s(tables), float64s(tables + 8 * BINS))
        drop(weights, n, bound, equal)
    if least > 0.0:
        w = float32s(weights)
        for i in range(n):
            w[i] = w[i] if w[i] >= least else _ZERO
    key = _splitmix(_splitmix(int64s(a.seed)[row]) + int64s(a.position)[row])
    return race(weights, n, key, float32s(tables))


row_of = njit(**OPTIONS)(_row)


@cache
def task() -> Task:
    """The compiled sampler."""

    def body(a: Any) -> None:
        for share in range(thread(), a.shares, threads()):
            weights = a.scratch + share * (a.vocabulary + SCRATCH) * 4
            weights += weights % 8
            for row in range(share, a.rows, a.shares):
                int64s(a.result)[row] = row_of(a, row, weights)

    return Task(body, Arguments)
