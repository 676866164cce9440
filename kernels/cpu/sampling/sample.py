"""The compiled CPU kernel of :mod:`trunkline.kernels.sample`: each thread computes whole rows of logits.

A token's weight is its unnormalised probability, ``exp((logit - largest) / temperature)``. top-k and
top-p keep a prefix of the tokens ordered by weight. The end of the prefix is found without sorting, by
radix selection: three histograms over 11 bits each of the weights' float32 representation, with the
number of tokens and the sum of weights in each bin. That is exact, and linear in the vocabulary size.

The draw is the Gumbel-max trick in its exponential form: the token with the smallest
``-log(1 - u) / weight`` wins, u being its noise. Since ``-log(1 - u) >= u``, the logarithm is computed
only for the few tokens with ``u <= best * weight``, best being the smallest value so far.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
from numba import njit

from trunkline.kernels.cpu.exponential import HALF, LEAST, LOG2E, exp2_fraction
from trunkline.kernels.cpu.threads import OPTIONS, Kernel, float32s, float64s, int32s, int64s, thread, threads

BINS = 2048
BATCH = 256  # tokens whose noise is computed at a time
SCRATCH = BATCH + 4 * BINS + 2  # float32 per thread beside the weights: noise, histograms in float64, alignment
_LOOPS: dict[str, Any] = {"fastmath": {"contract", "nsz", "afn"}, **OPTIONS}

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64
_MIX_A = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_B = -7723592293110705685  # 0x94D049BB133111EB


class Arguments:
    """The kernel's arguments: addresses, sizes, strides in elements."""

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
    """splitmix64 (Vigna) on int64 tensors or scalars; their products wrap around like unsigned ones."""
    x = x + _GOLDEN
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * _MIX_A
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * _MIX_B
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


_splitmix = njit(**OPTIONS)(splitmix)


def _mix(x: Any) -> Any:
    """Bijective 32-bit mixing function with low bias."""
    x = np.uint32((x ^ (x >> _16)) * _MIX_1)
    x = np.uint32((x ^ (x >> _15)) * _MIX_2)
    return np.uint32(x ^ (x >> _15))


mix = njit(**OPTIONS)(_mix)


def _noise(key: int, first: int, n: int, result: Any) -> None:
    """Uniform noise of the ``n`` tokens from ``first`` on, the same as :func:`trunkline.kernels.sample.noise`."""
    low, high = np.uint32(key & 0xFFFFFFFF), np.uint32((key >> 32) & 0xFFFFFFFF)
    for i in range(n):
        mixed = mix(np.uint32(mix(np.uint32(np.uint32(first + i) + low)) + high))
        whole = np.float32(np.int32(mixed >> np.uint32(1)))
        result[i] = (min(whole, _BELOW_ONE) + HALF) * _STEP


noise = njit(**OPTIONS)(_noise)


def _largest(logits: int, n: int) -> Any:
    """The largest of ``n`` logits, its index, and whether the row is broken: a NaN or +inf, or all are -inf.

    Compares bits, which vectorises: as int32, non-negative floats are ordered, and negative ones are once
    all bits but the sign are flipped.
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
    for i in range(best):  # bits order 0.0 above -0.0, but they are equal; take the first
        if value[i] == found:
            best = i
            break
    return found, best, broken


largest = njit(**OPTIONS)(_largest)


def _weigh(logits: Any, n: int, top: Any, temperature: Any, weights: int) -> None:
    """``weights[i] = exp((logits[i] - top) / temperature)``, 0 below 2**-126; vectorised, since without libm."""
    w, bits = float32s(weights), int32s(weights)
    scale = np.float32(LOG2E / temperature)
    for i in range(n):
        raw = (logits[i] - top) * scale
        t = max(raw, LEAST)
        whole = np.floor(t + HALF)
        f = t - whole
        w[i] = exp2_fraction(f)
        power = np.int32(whole) << np.int32(23)
        bits[i] = (bits[i] + power) if raw > LEAST else np.int32(0)


weigh = njit(**_LOOPS)(_weigh)


def _histogram(bits: Any, w: Any, n: int, prefix: int, shift: int, count: Any, mass: Any) -> None:
    """Histogram over 11 bits of the weights, from bit ``shift`` on, of those whose higher bits are ``prefix``.

    ``count``: tokens in each bin; ``mass``: sum of their weights.
    """
    for b in range(BINS):
        count[b] = 0.0
        mass[b] = 0.0
    for i in range(n):
        x = np.int64(bits[i]) >> shift
        if x >> 11 == prefix:
            count[x & 2047] += 1.0
            mass[x & 2047] += w[i]


histogram = njit(**OPTIONS)(_histogram)


def _cutoff(weights: int, n: int, k: float, p: float, count: Any, mass: Any) -> Any:
    """The smallest weight (its bits) that top-k and top-p keep, and how many tokens of exactly that weight.

    A token is kept if fewer than ``k`` tokens come before it, and their weights sum to less than ``p`` times
    the total. Weights have 31 bits, since the sign is 0; shifts of 22, 11 and 0 cover them.
    """
    bits, w = int32s(weights), float32s(weights)
    prefix, before, held, limit = np.int64(0), 0.0, 0.0, 0.0
    for step in range(3):
        histogram(bits, w, n, prefix, 22 - 11 * step, count, mass)
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
            return np.int64(prefix << (33 - 11 * step)), n  # by rounding, the limit is beyond the last token
        prefix = (prefix << 11) | inside
    each = mass[prefix & 2047] / count[prefix & 2047]
    equal = min(k - before, math.ceil((limit - held) / each)) if each > 0.0 else k - before
    return prefix, max(np.int64(equal), 1)


cutoff = njit(**OPTIONS)(_cutoff)


def _drop(weights: int, n: int, least: int, equal: int) -> None:
    """Set weights below ``least`` (bits) to zero, and those equal to it except for the first ``equal``."""
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


def _draw(weights: int, n: int, key: int, buffer: Any) -> Any:
    """The token with the smallest ``-log(1 - noise) / weight``, -1 if all weights are zero."""
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
                time = -math.log1p(-np.float64(buffer[i])) / np.float64(w[first + i])
                if time < best:
                    best, winner = time, first + i
                    bound = np.float32(best * 1.000001)
    return winner


draw = njit(**OPTIONS)(_draw)


def _row(a: Any, row: int, weights: int) -> Any:
    """The token of one row; ``weights`` is the address of the thread's scratch memory."""
    n, logits = a.vocabulary, a.logits + row * a.vocabulary * 4
    top, best, broken = largest(logits, n)
    if broken:
        return -1
    temperature, k = float64s(a.temperature)[row], int64s(a.top_k)[row]
    if temperature <= 0.0 or k == 1:
        return best
    weigh(float32s(logits), n, top, temperature, weights)
    p, min_p = float64s(a.top_p)[row], float64s(a.min_p)[row]
    tables = weights + ((n + 1) // 2 * 2) * 4
    if (1 <= k < n) or p < 1.0:
        bound, equal = cutoff(weights, n, float(k if k >= 1 else n), p, float64s(tables), float64s(tables + 8 * BINS))
        drop(weights, n, bound, equal)
    if min_p > 0.0:
        w = float32s(weights)
        for i in range(n):
            w[i] = w[i] if w[i] >= min_p else _ZERO
    key = _splitmix(_splitmix(int64s(a.seed)[row]) + int64s(a.position)[row])
    return draw(weights, n, key, float32s(tables))


row_of = njit(**OPTIONS)(_row)


@cache
def kernel() -> Kernel:
    """The compiled sampling kernel."""

    def body(a: Any) -> None:
        for share in range(thread(), a.shares, threads()):
            weights = a.scratch + share * (a.vocabulary + SCRATCH) * 4
            weights += weights % 8
            for row in range(share, a.rows, a.shares):
                int64s(a.result)[row] = row_of(a, row, weights)

    return Kernel(body, Arguments)
