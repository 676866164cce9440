"""Sizes of the blocks of :mod:`.flash`, and its record of arguments.

The path of one unit of work (one row, one KV head, one block of queries) through the caches, with sizes
for head width 64, 3 query heads per KV head, float32::

    memory   KV pool, or the new tokens k, v           q                           out
                    | copied as float32                 | scaled, transposed        ^ divided by the sum of weights
                    v                                   v                           |
    L2       key block     128 keys x 320 B = 40 KiB   15 panels of 16 query vectors, 8.6 KiB each = 128 KiB:
             value block   128 keys x 320 B = 40 KiB   queries [64, 16], sums over values [64, 16], softmax state
                    | for each block of keys, for each panel:
                    v
    L1       scores = keys x queries      panel's queries  64 x 64 B = 4 KiB,  scores [128, 16] = 8 KiB
             softmax, in place            scores, 8 KiB
             sums += values x scores      scores 8 KiB,  panel's sums  64 x 64 B = 4 KiB
                    |
                    v
    registers   both products: tiles of 6 x 16 accumulators = 12 of 16 AVX registers,
                + 2 with a row of the panel, + 1 with a key's or value's number in all lanes

A unit has at most 256 query vectors. The panels of a unit are at most about 192 KiB, and a block of
keys and values 96 KiB. Together that is 288 KiB, which fits in the L2 cache of server CPUs with AVX2 (512 KiB on
Zen 2 and 3; 1 MiB and more on Zen 4 and on Intel since Skylake-SP). What one panel needs at a time is
well below an L1 cache of 32 KiB, so keys and values can stream through it from L2.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from trunkline.kernels.cpu.vectors import LANES

from .flash_tiles import PANEL, ROW, SPARE, SUMS

_MAX_UNIT_VECTORS = 256  # query vectors of a unit
_QUERY_BYTES = 192 << 10  # bound of a unit's queries and sums
_KEY_BYTES = 96 << 10  # bound of a block of keys and values


class Arguments:
    """The kernel's arguments: addresses, sizes, strides in bytes."""

    q: int
    q_token: int
    q_head: int
    k: int  # 0: all keys and values are in the pool
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
    row_ids: int  # int32
    prompts: int  # rows
    claimed: int  # units of work that threads have claimed so far
    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    causal: int
    window: int  # 0: none
    chunk: int  # 0: none
    unit_queries: int  # tokens of a unit; each has heads / kv_heads query vectors
    block_keys: int  # keys of a block
    q_rows: int  # key_dim, rounded up to LANES
    v_rows: int  # value_dim, rounded up to LANES
    k_stride: int  # from key to key of a block
    v_stride: int
    staging_row: int  # from vector to vector of the staging area, where panels are transposed
    scratch_size: int  # of one thread
    scratch: int
    scale: float
    softcap: float


class Blocks(NamedTuple):
    """Block sizes of one call; the fields of the arguments with these names."""

    unit_queries: int
    block_keys: int
    q_rows: int
    v_rows: int
    k_stride: int
    v_stride: int
    staging_row: int
    scratch_size: int


def sizes(group_size: int, key_dim: int, value_dim: int, panels_per_call: int = 1) -> Blocks:
    """Block sizes for keys and values of these widths, and ``group_size`` query heads per KV head.

    ``panels_per_call``: how many panels are computed together.
    """
    q_rows, v_rows = (-(-width // LANES) * LANES for width in (key_dim, value_dim))
    # The smallest number of tokens whose query vectors fill whole panels.
    step = panels_per_call * PANEL // math.gcd(group_size, panels_per_call * PANEL)
    vectors = min(_MAX_UNIT_VECTORS, _QUERY_BYTES // (4 * (key_dim + value_dim)))
    queries = max(1, vectors // group_size // step) * step
    # An odd number of cache lines, so that the same dimension of successive keys lies in different L1 sets.
    k_stride, v_stride = (((width * 4 + 63) // 64 | 1) * 64 for width in (q_rows, v_rows))
    block = max(32, min(128, _KEY_BYTES // (k_stride + v_stride) // 16 * 16))
    width = max(q_rows, v_rows) * 4
    panels = -(-queries * group_size // (PANEL * panels_per_call)) * panels_per_call
    panel_bytes = SUMS + (q_rows + v_rows + SPARE) * ROW
    blocks_bytes = (block + SPARE) * (k_stride + v_stride + panels_per_call * ROW)
    size = blocks_bytes + PANEL * width + panels * panel_bytes + 64
    return Blocks(queries, block, q_rows, v_rows, k_stride, v_stride, width, size)
