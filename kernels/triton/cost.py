"""Predicted times of the attention kernels: by those of decode attention, the number of splits is chosen.

A model of what bounds a kernel: bytes against bandwidth, operations against the throughput of a multiprocessor,
programs against what fits on the GPU, reads that depend on one another, the last programs, and launches. Bandwidths are
those of copies, throughputs those of data sheets; latencies and the time of a tile are assumptions, which no
measurement has confirmed yet. docs/gpu-predictions.md has the results.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Self

import numpy as np

from .plans import Plan

SCRATCH_BYTES = 32 << 20  # of the splits' results
TOLERANCE = 1.01  # of predicted time; see :func:`splits`
START = 3  # reads that depend on one another before a program's first product: a length, slots, keys
EXPONENTIALS = 16  # per clock and multiprocessor
ELEMENTWISE = 8  # operations of a softmax per score, besides the exponential: scaling, mask, maximum, sum, conversion


@dataclass(frozen=True, slots=True)
class Gpu:
    """What the model needs to know of an architecture; the figures are those of its server GPUs."""

    multiprocessors: int
    bandwidth: float  # bytes per second
    clock: float  # Hz
    products: int  # FLOPs of bf16 tensor cores per clock and multiprocessor
    lanes: int  # float32 operations per clock and multiprocessor
    latency: float = 0.8e-6  # seconds from a request to its bytes, under load
    tile: float = 0.8e-6  # decode: seconds of a tile's products and softmax, which depend on one another
    launch: float = 3e-6  # seconds

    @property
    def flops(self) -> float:
        """FLOPs per second of bf16 tensor cores."""
        return self.multiprocessors * self.products * self.clock


GPUS = {
    "sm_80": Gpu(108, 1.6e12, 1.41e9, 2048, 64),  # A100
    "sm_90": Gpu(132, 3.0e12, 1.83e9, 4096, 128),  # H100
    "sm_100": Gpu(148, 6.8e12, 1.85e9, 8192, 128),  # B200
    "gfx942": Gpu(304, 4.0e12, 2.1e9, 2048, 64, latency=1.2e-6),  # MI300X
}


@dataclass(frozen=True, slots=True)
class DecodeWork:
    """Decode attention of one layer. Lengths are rounded up, so that few different values occur while serving."""

    rows: int
    longest: int  # keys that a row sees, the largest number
    total: int  # keys that all rows see
    heads: int
    groups: int  # programs per row and split, each of which reads all keys of its split
    key_bytes: int  # of one key and value of one KV head
    value_width: int

    @classmethod
    def of(cls, lengths: np.ndarray, span: int, heads: int, groups: int, key_bytes: int, value_width: int) -> Self:
        """``lengths`` int32 [rows]: numbers of keys, of which the last ``span`` at most are visible."""
        longest = min(int(lengths.max()), span)
        total = min(int(lengths.sum()), len(lengths) * longest)
        return cls(len(lengths), _rounded(longest), _rounded(total), heads, groups, key_bytes, value_width)


def _rounded(n: int) -> int:
    """``n`` rounded up to three significant bits."""
    step = 1 << max(0, n.bit_length() - 3)
    return -(-n // step) * step


@cache
def gpu(architecture: str, multiprocessors: int) -> Gpu:
    """A GPU of an architecture with this number of multiprocessors, and with bandwidth in proportion to it."""
    server = GPUS[architecture]
    bandwidth = server.bandwidth * multiprocessors / server.multiprocessors
    return replace(server, multiprocessors=multiprocessors, bandwidth=bandwidth)


@lru_cache(maxsize=4096)
def splits(architecture: str, plan: Plan, work: DecodeWork, bounds: bool = False, multiprocessors: int = 0) -> int:
    """The number of splits per row: the largest that is within 1% of the best one, because rows may be unequal.

    ``multiprocessors`` of the GPU at hand; 0: as many as the architecture's server GPU has.

    With ``bounds``, rows may be shorter than ``work`` says, as when a CUDA graph is captured. The best number is then
    the one whose predicted time exceeds the shortest by the smallest factor in the worst of several cases.
    """
    if plan.splits == 1:
        return 1
    device = gpu(architecture, multiprocessors) if multiprocessors else GPUS[architecture]
    bytes_per_split = work.rows * work.heads * (work.value_width + 2) * 4
    max_splits = max(1, min(plan.splits, -(-work.longest // plan.smallest_share), SCRATCH_BYTES // bytes_per_split))
    factors = [1.0] * max_splits
    for case in _shorter(work) if bounds else (work,):
        times = [decode_seconds(device, plan, case, count) for count in range(1, max_splits + 1)]
        factors = [max(factor, seconds / min(times)) for factor, seconds in zip(factors, times, strict=True)]
    limit = min(factors) * TOLERANCE
    return max(count for count, factor in enumerate(factors, 1) if factor <= limit)


def _shorter(work: DecodeWork) -> Iterator[DecodeWork]:
    """``work`` with equal rows of several lengths, and with one of these among short ones."""
    short = -(-work.longest // 128)
    for length in (work.longest, -(-work.longest // 4), -(-work.longest // 32)):
        yield replace(work, longest=length, total=work.rows * length)
        yield replace(work, longest=length, total=length + (work.rows - 1) * short)


def decode_seconds(gpu: Gpu, plan: Plan, work: DecodeWork, count: int) -> float:
    """The predicted time with ``count`` splits."""
    tiles, used = _shares(plan, work.longest, count)
    _, used_by_others = _shares(plan, (work.total - work.longest) / max(1, work.rows - 1), count)
    filled = used + (work.rows - 1) * used_by_others
    room, share = gpu.multiprocessors * plan.resident, work.total / filled
    tile = max(gpu.tile, gpu.latency / (plan.stages - 1))
    # As many programs as there is room for share the bandwidth; the last ones may be too few to use all of it.
    waves, rest = divmod(filled * work.groups, room)
    full, last = (max(n * share * work.key_bytes / gpu.bandwidth, share / plan.block_n * tile) for n in (room, rest))
    stream = waves * full + (last if rest else 0.0)
    empty = (work.rows * count - filled) * work.groups / room * gpu.latency
    seconds = START * gpu.latency + max(stream + empty, tiles * tile) + gpu.launch
    if count == 1:
        return seconds
    parts = 2 * work.heads * filled * (work.value_width + 2) * 4
    return seconds + parts / gpu.bandwidth + 2 * gpu.latency + gpu.launch


def _shares(plan: Plan, keys: float, count: int) -> tuple[int, int]:
    """(tiles of a split, splits with keys) of a row."""
    every = max(1, math.ceil(keys / plan.block_n))
    smallest = plan.smallest_share // plan.block_n if count > 1 else 1
    tiles = min(every, max(math.ceil(keys / count / plan.block_n), smallest))
    return tiles, math.ceil(every / tiles)


def extend_seconds(gpu: Gpu, plan: Plan, tokens: int, heads: int, kv_heads: int, width: int) -> float:
    """The predicted time of causal attention in bf16 of one row of ``tokens`` new tokens without a cached prefix."""
    queries = plan.block_m // (heads // kv_heads)
    ends = [min(tokens, first + queries) for first in range(0, tokens, queries)]
    together = min(plan.resident, -(-len(ends) * kv_heads // gpu.multiprocessors))  # programs on a multiprocessor
    scores = plan.block_m * plan.block_n
    products = 4 * scores * width / (gpu.products * gpu.clock)
    softmax = scores * (1 / EXPONENTIALS + ELEMENTWISE / gpu.lanes) / gpu.clock
    # Products of a program are computed during the softmax of another one, but not of its own.
    tile = max(products + softmax, together * max(products, softmax), gpu.latency / (plan.stages - 1))
    free = [0.0] * (gpu.multiprocessors * together)  # when each place for a program is free
    for end in ends[::-1] * kv_heads:  # in the order in which they start
        heapq.heapreplace(free, free[0] + START * gpu.latency + -(-end // plan.block_n) * tile)
    return max(free) + gpu.launch
