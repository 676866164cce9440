"""What the kernels for rows with one query have in common: :mod:`.paged`, :mod:`.ordered` and its variant for pairs.

:mod:`.flash` has the :func:`normalizer`, too.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit

from trunkline.kernels.cpu.exponential import LOG2E
from trunkline.kernels.cpu.threads import OPTIONS, float32s, int32s
from trunkline.kernels.cpu.vectors import LANES

from .flash_tiles import convert

# numba compiles globals in as constants. Typed ones: a Python float would widen the arithmetic to float64.
_ONE, _ZERO, _LN2 = np.float32(1.0), np.float32(0.0), np.float32(math.log(2))

widen, copy, narrow = convert(True, False), convert(False, False), convert(False, True)
padded = njit(**OPTIONS)(lambda width: (width + LANES - 1) // LANES * LANES)


class Arguments:
    """What kernels of rows with one query have in common: addresses, sizes, strides in elements."""

    q: int
    q_token: int
    q_head: int
    keys: int
    values: int
    out: int
    scratch: int
    sinks: int  # 0: none
    table: int
    max_len: int
    table_row: int
    q_start: int
    kv_len: int
    row_ids: int  # int32
    decodes: int  # rows
    heads: int
    kv_heads: int
    window: int  # 0: none
    chunk: int  # 0: none
    scale: float
    softcap: float


def _first_key(a: Any, position: int) -> Any:
    first = np.int64(0)
    if a.window > 0:
        first = max(first, position + 1 - a.window)
    if a.chunk > 0:
        first = max(first, position // a.chunk * a.chunk)
    return first


first_key = njit(**OPTIONS)(_first_key)


def _slots_of(a: Any, row: int) -> Any:
    """The address of a row's slots in the slot table."""
    return a.table + np.int64(int32s(a.table_row)[row]) * a.max_len * 4


slots_of = njit(**OPTIONS)(_slots_of)


def _load_query(a: Any, token: int, head: int, width: int, bf16: bool, address: int) -> None:
    """Copy one query vector to ``address`` as float32, zero-padded; scaled, so that scores are exponents of 2."""
    offset, query = token * a.q_token + head * a.q_head, float32s(address)
    # With a softcap, scores are the arguments of tanh.
    factor = np.float32(a.scale / a.softcap if a.softcap > 0 else a.scale * LOG2E)
    if bf16:
        widen(a.q + offset * 2, address, width, factor)
    else:
        copy(a.q + offset * 4, address, width, factor)
    for d in range(width, padded(width)):
        query[d] = _ZERO


load_query = njit(**OPTIONS)(_load_query)


def _normalizer(a: Any, head: Any, largest: Any, weight: Any) -> Any:
    """The factor of one query head's sums over values.

    ``largest``: the score to which they and ``weight``, the sum of softmax weights, are scaled.
    """
    if a.sinks == 0:
        return _ONE / weight
    sink = float32s(a.sinks)[head] * LOG2E  # one more softmax column, without a value
    top = max(largest, sink)
    scale = np.float32(math.exp((largest - top) * _LN2))
    return scale / (weight * scale + np.float32(math.exp((sink - top) * _LN2)))


normalizer = njit(**OPTIONS)(_normalizer)


def _normalize(a: Any, token: int, head: int, address: int, width: int, bf16: bool, largest: Any, weight: Any) -> None:
    """Write one query head's output: the sums over values at ``address``, times their :func:`normalizer`."""
    offset, factor = (token * a.heads + head) * width, normalizer(a, head, largest, weight)
    if bf16:
        narrow(address, a.out + offset * 2, width, factor)
    else:
        copy(address, a.out + offset * 4, width, factor)


normalize = njit(**OPTIONS)(_normalize)
