"""The predicted time of paged decode attention, by which the number of splits is chosen.

A model of what bounds the kernel: bytes against bandwidth, programs against what fits on the GPU, the time of a tile in
one program (its products and softmax, or the memory's latency divided by the tiles that are requested ahead), the
longest program, and launches. Bandwidths are those of copies; the times are assumptions, which no measurement has
confirmed yet.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Self

import numpy as np

from .plans import Plan

SCRATCH_BYTES = 32 << 20  # of the splits' results
TOLERANCE = 1.02  # of predicted time; see :func:`splits`


@dataclass(frozen=True, slots=True)
class Gpu:
    """What the model needs to know of an architecture; the figures are those of its server GPUs."""

    multiprocessors: int
    bandwidth: float  # bytes per second
    latency: float = 0.8e-6  # seconds from a request to its bytes, under load
    tile: float = 0.8e-6  # seconds of a tile's products and softmax, which depend on one another
    launch: float = 3e-6  # seconds


GPUS = {
    "sm_80": Gpu(108, 1.6e12),  # A100
    "sm_90": Gpu(132, 3.0e12),  # H100
    "sm_100": Gpu(148, 6.8e12),  # B200
    "gfx942": Gpu(304, 4.0e12, latency=1.2e-6),  # MI300X
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
def splits(architecture: str, plan: Plan, work: DecodeWork) -> int:
    """The number of splits per row: the largest whose predicted time is within 2% of the least.

    The largest, because rows may be of unequal lengths, and shorter than in the arrays from which a graph is captured.
    """
    if plan.splits == 1:
        return 1
    bytes_per_split = work.rows * work.heads * (work.value_width + 2) * 4
    most = max(1, min(plan.splits, -(-work.longest // plan.smallest_share), SCRATCH_BYTES // bytes_per_split))
    times = {count: decode_seconds(GPUS[architecture], plan, work, count) for count in range(1, most + 1)}
    least = min(times.values())
    return max(count for count, seconds in times.items() if seconds <= least * TOLERANCE)


def decode_seconds(gpu: Gpu, plan: Plan, work: DecodeWork, count: int) -> float:
    """The predicted time with ``count`` splits."""
    tiles = max(math.ceil(work.longest / count / plan.block_n), plan.smallest_share // plan.block_n if count > 1 else 1)
    programs = max(work.rows, work.total / (tiles * plan.block_n)) * work.groups
    room = gpu.multiprocessors * plan.resident
    waves = programs / room
    tail = 1.0 if waves <= 1 else math.ceil(waves) / waves if waves < 4 else 1 + 0.5 / waves
    tile = max(gpu.tile, gpu.latency / (plan.stages - 1))
    bandwidth = min(gpu.bandwidth, min(programs, room) * plan.block_n * work.key_bytes / tile)
    stream = work.total * work.groups * work.key_bytes / bandwidth * tail
    longest = tiles * tile
    if count == 1:
        return max(stream, longest) + gpu.launch
    parts = 2 * work.rows * work.heads * count * (work.value_width + 2) * 4
    return max(stream, longest) + parts / gpu.bandwidth + 2 * gpu.launch
