"""Sizes of tiles and numbers of warps for each operation: frozen tables, nothing is tuned while serving.

Attention plans depend on the padded head dim and on the dtype's width in bytes. They were chosen by compiling for each
architecture without a GPU: no spilled registers, shared memory within limits (99 KiB for "sm_80", which other GPUs of
its generation and the next have). The interpreter's plans make few and large programs, since each costs milliseconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from .launch import INTERPRETER, power_of_two

SMALLEST_SHARE = 2  # tiles of a split: with fewer, its start and end would take longer than its loop


@dataclass(frozen=True, slots=True)
class Plan:
    """Sizes of a program's tile, warps and pipeline stages. A field that an operation doesn't have is 1."""

    block_m: int = 1  # rows: queries times heads of a group, tokens
    block_n: int = 1  # columns: keys, numbers of a row
    warps: int = 4
    stages: int = 1
    splits: int = 1  # at most, of a row's keys
    resident: int = 1  # attention: programs per multiprocessor, by registers and shared memory as compiled

    @property
    def smallest_share(self) -> int:
        """Keys of a split, at least."""
        return SMALLEST_SHARE * self.block_n


# (architecture, bytes per number): plans by padded head dim, the first that is at least as wide.
DECODE: dict[tuple[str, int], dict[int, Plan]] = {
    ("sm_80", 2): {
        64: Plan(16, 64, stages=3, splits=64, resident=7),
        128: Plan(16, 64, stages=3, splits=64, resident=4),
        256: Plan(16, 64, stages=3, splits=64, resident=2),
    },
    ("sm_90", 2): {
        64: Plan(16, 64, stages=3, splits=64, resident=6),
        128: Plan(16, 64, stages=3, splits=64, resident=4),
        256: Plan(16, 64, stages=3, splits=64, resident=2),
    },
    ("sm_100", 2): {
        64: Plan(16, 128, stages=3, splits=64, resident=4),
        128: Plan(16, 64, stages=3, splits=64, resident=4),
        256: Plan(16, 64, stages=3, splits=64, resident=2),
    },
    ("gfx942", 2): {
        64: Plan(16, 64, stages=3, splits=64, resident=3),
        128: Plan(16, 64, stages=3, splits=64, resident=1),
        256: Plan(16, 32, stages=3, splits=64, resident=1),
    },
    ("sm_80", 4): {
        64: Plan(16, 32, warps=8, stages=2, splits=64, resident=3),
        128: Plan(16, 32, warps=8, stages=2, splits=64, resident=3),
        256: Plan(16, 32, warps=8, stages=2, splits=64, resident=1),
    },
    ("sm_90", 4): {
        128: Plan(16, 32, warps=8, stages=2, splits=64, resident=4),
        256: Plan(16, 32, warps=8, stages=2, splits=64, resident=2),
    },
    ("sm_100", 4): {
        64: Plan(16, 32, warps=8, stages=2, splits=64, resident=4),
        128: Plan(16, 16, stages=2, splits=64, resident=6),
        256: Plan(16, 32, warps=8, stages=2, splits=64, resident=2),
    },
    ("gfx942", 4): {
        64: Plan(16, 32, warps=8, stages=2, splits=64, resident=2),
        128: Plan(16, 32, warps=8, stages=2, splits=64, resident=1),
        256: Plan(16, 16, stages=2, splits=64, resident=1),
    },
}
EXTEND: dict[tuple[str, int], dict[int, Plan]] = {
    ("sm_80", 2): {
        64: Plan(64, 64, stages=2, resident=2),
        128: Plan(128, 32, warps=8, stages=2),
        256: Plan(64, 32, warps=8, stages=2),
    },
    ("sm_90", 2): {
        64: Plan(128, 64, warps=8, stages=2),
        128: Plan(128, 64, warps=8, stages=2),
        256: Plan(64, 32, warps=8, stages=2),
    },
    ("sm_100", 2): {
        64: Plan(128, 32, warps=8, stages=2, resident=2),
        128: Plan(128, 64, warps=8, stages=2),
        256: Plan(64, 32, warps=8, stages=2),
    },
    ("gfx942", 2): {
        64: Plan(64, 32, stages=2, resident=3),
        128: Plan(64, 32, stages=2, resident=2),
        256: Plan(64, 32, stages=2),
    },
    ("sm_80", 4): {
        64: Plan(16, 32, warps=8, stages=2, resident=3),
        128: Plan(32, 16, warps=8, stages=2, resident=3),
        256: Plan(32, 16, warps=8, stages=2, resident=2),
    },
    ("sm_90", 4): {
        128: Plan(32, 16, warps=8, stages=2, resident=2),
        256: Plan(32, 16, warps=8, stages=2, resident=2),
    },
    ("sm_100", 4): {
        128: Plan(32, 16, warps=8, stages=2, resident=2),
        256: Plan(32, 16, warps=8, stages=2, resident=2),
    },
    ("gfx942", 4): {
        128: Plan(32, 32, warps=8, stages=2),
        256: Plan(32, 16, warps=8, stages=2),
    },
}
TINY_DECODE = Plan(128, 64)
TINY_EXTEND = Plan(64, 64)


def decode(architecture: str, width: int, itemsize: int) -> Plan:
    """The plan of paged decode attention; ``width``: the wider one of a key and a value. ValueError beyond 256."""
    return TINY_DECODE if architecture == INTERPRETER else _by_width(DECODE[architecture, itemsize], width)


def extend(architecture: str, width: int, itemsize: int) -> Plan:
    """The plan of attention over several new tokens, as :func:`decode`."""
    return TINY_EXTEND if architecture == INTERPRETER else _by_width(EXTEND[architecture, itemsize], width)


def _by_width(plans: dict[int, Plan], width: int) -> Plan:
    for widest, plan in plans.items():
        if width <= widest:
            return plan
    raise ValueError(f"the triton backend has no attention for heads of {width} numbers, only up to 256")


@cache
def rows(architecture: str, width: int) -> Plan:
    """The plan of operations on whole rows of ``width`` numbers, such as norms: ``block_n`` holds a row."""
    block_n = power_of_two(width)
    if architecture == INTERPRETER:
        return Plan(64, block_n)
    return Plan(max(1, 16 * _threads(architecture) // block_n), block_n, warps=max(4, min(16, block_n // 512)))


@cache
def heads(architecture: str, width: int) -> Plan:
    """The plan of operations on single heads of ``width`` numbers, of all tokens."""
    return Plan(512, power_of_two(width)) if architecture == INTERPRETER else rows(architecture, width)


@cache
def columns(architecture: str, width: int) -> Plan:
    """The plan of elementwise operations on rows of ``width`` numbers."""
    if architecture == INTERPRETER:
        return Plan(64, min(4096, power_of_two(width)))
    numbers = 8 * _threads(architecture)  # 16 bytes per thread, in bf16
    block_n = min(numbers, power_of_two(width))
    return Plan(numbers // block_n, block_n)


def _threads(architecture: str) -> int:
    """Of a program with 4 warps."""
    return 256 if architecture == "gfx942" else 128


@cache
def vocabulary(architecture: str, size: int) -> Plan:
    """The plan of operations on rows of ``size`` logits, which a program reads in blocks."""
    if architecture == INTERPRETER:
        return Plan(block_n=min(1 << 16, power_of_two(size)))
    return Plan(block_n=min(8192, power_of_two(size)), warps=16)


@cache
def pooled(architecture: str, width: int) -> Plan:
    """The plan of reductions over rows of ``width`` numbers: few columns, for as many programs as possible."""
    return Plan(128, power_of_two(width)) if architecture == INTERPRETER else Plan(32, min(64, power_of_two(width)))
