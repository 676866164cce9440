"""Measures JSON before it is decoded: its nesting depth and number of values.

Decoding holds the GIL, so its time is bounded by a limit on values. Functions that traverse a decoded value may
recurse, so the depth is limited, too.
"""

from __future__ import annotations

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

MAX_DEPTH = 64  # more than any client needs, and far below Python's recursion limit

_BLOCK = 1 << 16  # bytes; other threads can run between two blocks
_STEPS = np.zeros(256, np.int8)
_STEPS[list(b"[{")] = 1
_STEPS[list(b"]}")] = -1


class Shape(Struct, frozen=True):
    """Size of a JSON text. For invalid JSON the numbers are undefined."""

    depth: int = 0  # of nested arrays and objects
    nodes: int = 0  # number of arrays, objects and strings, keys included
    items: int = 0  # number of commas outside strings: values in arrays and objects, less one per non-empty one


def measure(body: bytes) -> Shape:
    """Measure JSON. Takes about 5 ms per megabyte; other threads can run meanwhile."""
    if b"\\" in body:  # remove escaped backslashes, then escaped quotes: the other quotes begin or end a string
        body = body.replace(rb"\\", b"").replace(rb"\"", b"")
    depth = deepest = nodes = quotes = items = 0
    in_string = False
    for start in range(0, len(body), _BLOCK):
        block = np.frombuffer(body, np.uint8, min(_BLOCK, len(body) - start), start)
        quote = block == ord('"')
        within = np.logical_xor.accumulate(quote) ^ in_string
        in_string = bool(within[-1])
        bare = block[~within]
        begins = _count(bare, "[{")
        if begins:
            levels = _STEPS[bare].cumsum(dtype=np.int32)
            deepest = max(deepest, depth + int(levels.max()))
        depth += begins - _count(bare, "]}")
        nodes += begins
        quotes += int(np.count_nonzero(quote))
        items += _count(bare, ",")
    return Shape(deepest, nodes + quotes // 2, items)


def _count(block: NDArray[np.uint8], characters: str) -> int:
    return sum(int(np.count_nonzero(block == ord(character))) for character in characters)


def too_deep(body: bytes) -> bool:
    """Whether valid JSON is nested more than :data:`MAX_DEPTH` levels deep."""
    if body.count(b"[") + body.count(b"{") <= MAX_DEPTH:
        return False
    return measure(body).depth > MAX_DEPTH
