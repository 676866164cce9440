"""What :mod:`.flash` gets: its record of arguments, and the sizes of the blocks that it works on."""

from __future__ import annotations

import math
from typing import NamedTuple

from trunkline.kernels.cpu.vectors import LANES

from .flash_tiles import PANEL, ROW, SPARE, SUMS

_LANES_OF_A_UNIT = 256
_QUERY_BYTES = 192 << 10  # a unit's queries and sums, and
_KEY_BYTES = 96 << 10  # its block of keys and values share the L2 cache


class Arguments:
    """What the loop gets: addresses, sizes, strides in bytes."""

    q: int
    q_token: int
    q_head: int
    k: int
    k_token: int
    k_head: int
    v: int
    v_token: int
    v_head: int
    keys: int  # 0: no pool
    values: int
    out: int
    sinks: int  # 0: none
    table: int
    max_len: int
    table_row: int
    q_start: int
    kv_len: int
    which: int  # rows, int32
    units: int
    grain: int  # units that a thread claims at a time
    claimed: int  # units, by all threads
    heads: int
    groups: int  # heads of keys and values
    key_dim: int
    value_dim: int
    causal: int
    window: int  # 0: any
    chunk: int  # 0: any
    queries: int  # of a unit
    block: int  # keys of a block
    q_rows: int  # key_dim, padded
    v_rows: int  # value_dim, padded
    k_line: int  # bytes from key to key in scratch
    v_line: int
    width: int
    size: int  # bytes of a thread's scratch
    scratch: int
    scale: float
    softcap: float


class Blocks(NamedTuple):
    """Sizes of what one thread works on; the fields of :class:`Arguments` with these names."""

    queries: int
    block: int
    q_rows: int
    v_rows: int
    k_line: int
    v_line: int
    width: int
    size: int


def sizes(share: int, key_dim: int, value_dim: int, together: int = 1) -> Blocks:
    """Block sizes for heads of these widths, ``share`` query heads to a head of keys, so many panels ``together``."""
    q_rows, v_rows = (-(-width // LANES) * LANES for width in (key_dim, value_dim))
    step = together * PANEL // math.gcd(share, together * PANEL)  # queries that fill whole panels
    lanes = min(_LANES_OF_A_UNIT, _QUERY_BYTES // (4 * (key_dim + value_dim)))
    queries = max(1, lanes // share // step) * step
    # An odd number of cache lines: numbers below each other spread over the L1 cache.
    k_line, v_line = (((width * 4 + 63) // 64 | 1) * 64 for width in (q_rows, v_rows))
    block = max(32, min(128, _KEY_BYTES // (k_line + v_line) // 16 * 16))
    width = max(q_rows, v_rows) * 4
    panels = -(-queries * share // (PANEL * together)) * together * (SUMS + (q_rows + v_rows + SPARE) * ROW)
    size = (block + SPARE) * (k_line + v_line + together * ROW) + PANEL * width + panels + 64
    return Blocks(queries, block, q_rows, v_rows, k_line, v_line, width, size)
