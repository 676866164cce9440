"""Sampling without sorting: one program per row, which reads the row's logits several times.

A token's weight is ``exp((logit - largest) / temperature)``, at most 1. top-k and top-p keep the largest weights: the
smallest of them is found by bisection over the bits of float32 numbers, which are ordered as the numbers are::

    weights   0 . . . . . . low . . . . high . . . . 1        kept: all from ``high`` on, and of ``[low, high)``, which
                             |  bisected |                    are equal or a single token at the end, the first few

The draw is the Gumbel-max trick in its exponential form, with the noise of :mod:`trunkline.kernels.sample`, bit by bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import plans
from .elements import LOG2E
from .launch import architecture

ABOVE_ONE = tl.constexpr(0x3F800001)  # the bits of the smallest float32 above 1
GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)
MIX_A, MIX_B = tl.constexpr(0xBF58476D1CE4E5B9), tl.constexpr(0x94D049BB133111EB)
LOW_32 = tl.constexpr(0xFFFFFFFF)
# Temperatures are cut to these, and tokens of less weight are never drawn: else quotients could overflow, or -inf
# become NaN.
MIN_TEMPERATURE, MAX_TEMPERATURE = tl.constexpr(1e-30), tl.constexpr(1e30)
MIN_WEIGHT = tl.constexpr(1e-36)


def sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seed: torch.Tensor,
    position: torch.Tensor,
) -> torch.Tensor:
    """:func:`trunkline.kernels.sample.sample_reference` as a Triton kernel; ``logits`` of any float dtype.

    Weights and their sums are float32: a token at the edge of top-p may be kept that the reference drops, and
    reversely, if its rank in probability mass is within 1e-6 of ``top_p``.
    """
    rows, vocabulary = logits.shape
    result = torch.empty(rows, dtype=torch.int64, device=logits.device)
    plan = plans.vocabulary(architecture(), vocabulary)
    sample_kernel[(rows,)](
        logits.contiguous(), temperature, top_k, top_p, min_p, seed, position, result,
        VOCABULARY=vocabulary, BLOCK_N=plan.block_n, num_warps=plan.warps,
    )  # fmt: skip
    return result


@triton.jit
def splitmix(x: tl.tensor) -> tl.tensor:
    """splitmix64 (Vigna) on uint64."""
    x = x + GOLDEN
    x = (x ^ (x >> 30)) * MIX_A
    x = (x ^ (x >> 27)) * MIX_B
    return x ^ (x >> 31)


@triton.jit
def mix(x: tl.tensor) -> tl.tensor:
    """Bijective mixing function on uint32."""
    x = (x ^ (x >> 16)) * tl.full((), 0x21F0AAAD, tl.uint32)
    x = (x ^ (x >> 15)) * tl.full((), 0xD35A2D97, tl.uint32)
    return x ^ (x >> 15)


@triton.jit
def noise(seed: tl.tensor, position: tl.tensor, ids: tl.tensor) -> tl.tensor:
    """Uniform float32 in (0, 1) for int64 ``seed`` and ``position`` and int32 ``ids``."""
    key = splitmix(splitmix(seed.to(tl.uint64)) + position.to(tl.uint64))
    mixed = mix(mix(ids.to(tl.uint32) + (key & LOW_32).to(tl.uint32)) + (key >> 32).to(tl.uint32))
    whole = (mixed >> 1).to(tl.int32).to(tl.float32)
    return (tl.minimum(whole, 2147483392.0) + 0.5) * 4.656612873077393e-10


@triton.jit
def exponential(u: tl.tensor) -> tl.tensor:
    """``-log(1 - u)``, exact for small ``u``, too (Kahan's log1p)."""
    rest = 1.0 - u
    lost = 1.0 - rest
    return tl.where(lost == 0, u, -tl.log(rest) * (u / tl.where(lost == 0, 1.0, lost)))


@triton.jit
def find_largest(
    logits: tl.tensor, VOCABULARY: tl.constexpr, BLOCK_N: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """(largest logit, its first id, whether the row can't be sampled: it has a NaN or +inf, or nothing but -inf)."""
    largest, best, unordered = -float("inf"), 0, 0
    for start in range(0, VOCABULARY, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        x = tl.load(logits + column, column < VOCABULARY, other=-float("inf")).to(tl.float32)
        unordered += tl.sum((x != x).to(tl.int32), 0)
        x = tl.where(x == x, x, -float("inf"))
        block_largest, block_best = tl.max(x, 0), tl.argmax(x, 0)
        best = tl.where(block_largest > largest, start + block_best, best)
        largest = tl.maximum(largest, block_largest)
    return largest, best, (unordered > 0) | (tl.abs(largest) == float("inf"))


@triton.jit
def weights_at(
    logits: tl.tensor, column: tl.tensor, largest: tl.tensor, scale: tl.tensor, VOCABULARY: tl.constexpr
) -> tl.tensor:
    """The weights of the tokens ``column``; 0 beyond the vocabulary."""
    x = tl.load(logits + column, column < VOCABULARY, other=-float("inf")).to(tl.float32)
    return tl.exp2((x - largest) * scale)


@triton.jit
def count_from(
    logits: tl.tensor, bits: tl.tensor, largest: tl.tensor, scale: tl.tensor, VOCABULARY: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """(number, sum of weights) of the tokens whose weight has at least the given bits."""
    count, mass = 0, 0.0
    for start in range(0, VOCABULARY, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        weight = weights_at(logits, column, largest, scale, VOCABULARY)
        kept = (weight.to(tl.int32, bitcast=True) >= bits) & (column < VOCABULARY)
        count += tl.sum(kept.to(tl.int32), 0)
        mass += tl.sum(tl.where(kept, weight, 0.0), 0)
    return count, mass


@triton.jit
def find_cutoff(
    logits: tl.tensor, largest: tl.tensor, scale: tl.tensor, k: tl.tensor, p: tl.tensor,
    VOCABULARY: tl.constexpr, BLOCK_N: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """(low, high, equal): of the weights from ``low`` to below ``high`` (their bits), the first ``equal`` are kept.

    A token is kept if fewer than ``k`` tokens come before it, whose weights sum to less than ``p`` times all.
    """
    low, high, count_high, mass_high = 0, ABOVE_ONE + 0, 0, 0.0
    count_low, mass_low = count_from(logits, low, largest, scale, VOCABULARY, BLOCK_N)
    limit = mass_low * p
    while (high - low > 1) & (count_low - count_high > 1):
        middle = (low + high) // 2
        count, mass = count_from(logits, middle, largest, scale, VOCABULARY, BLOCK_N)
        if (count >= k) | (mass >= limit):
            low, count_low, mass_low = middle, count, mass
        else:
            high, count_high, mass_high = middle, count, mass
    each = (mass_low - mass_high) / tl.maximum(count_low - count_high, 1)
    by_mass = tl.where(each > 0, tl.ceil((limit - mass_high) / tl.where(each > 0, each, 1.0)), VOCABULARY)
    equal = tl.minimum(k - count_high, tl.minimum(by_mass, VOCABULARY).to(tl.int32))
    return low, high, tl.maximum(equal, 1)


@triton.jit(do_not_specialize=("temperature", "top_k", "top_p", "min_p", "seed", "position", "result"))
def sample_kernel(
    logits: tl.tensor, temperature: tl.tensor, top_k: tl.tensor, top_p: tl.tensor, min_p: tl.tensor, seed: tl.tensor,
    position: tl.tensor, result: tl.tensor, VOCABULARY: tl.constexpr, BLOCK_N: tl.constexpr,
) -> None:  # fmt: skip
    """Grid (rows)."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * VOCABULARY
    largest, best, broken = find_largest(logits, VOCABULARY, BLOCK_N)
    if broken:
        tl.store(result + row, -1)
        return
    row_temperature, k = tl.load(temperature + row).to(tl.float32), tl.load(top_k + row)
    if (row_temperature <= 0) | (k == 1):
        tl.store(result + row, best)
        return
    scale = LOG2E / tl.minimum(tl.maximum(row_temperature, MIN_TEMPERATURE), MAX_TEMPERATURE)
    p, smallest = tl.load(top_p + row).to(tl.float32), tl.load(min_p + row).to(tl.float32)
    k = tl.where((k < 1) | (k > VOCABULARY), VOCABULARY, k).to(tl.int32)
    low, high, equal = 0, 0, 0
    if (k < VOCABULARY) | (p < 1):
        low, high, equal = find_cutoff(logits, largest, scale, k, p, VOCABULARY, BLOCK_N)
    row_seed, row_position = tl.load(seed + row), tl.load(position + row)
    winner, shortest, equals = -1, float("inf"), 0
    for start in range(0, VOCABULARY, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        weight = weights_at(logits, column, largest, scale, VOCABULARY)
        bits = weight.to(tl.int32, bitcast=True)
        at_edge = (bits >= low) & (bits < high)
        rank = equals + tl.cumsum(at_edge.to(tl.int32), 0)
        equals += tl.sum(at_edge.to(tl.int32), 0)
        kept = ((bits >= high) | (at_edge & (rank <= equal))) & (weight >= smallest) & (weight > MIN_WEIGHT)
        time = exponential(noise(row_seed, row_position, column)) / tl.where(kept, weight, 1.0)
        time = tl.where(kept, time, float("inf"))
        first, block_winner = tl.min(time, 0), tl.argmin(time, 0)
        winner = tl.where(first < shortest, start + block_winner, winner)
        shortest = tl.minimum(shortest, first)
    tl.store(result + row, winner)
