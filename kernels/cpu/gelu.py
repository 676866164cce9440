"""The loops of :mod:`trunkline.kernels.gelu`: computed in float32, looked up in bfloat16."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numba import njit

from .elements import LOOPS, address, team_for
from .glu import exp
from .threads import OPTIONS, Task, float32s, int64s, thread, threads, uint16s


class Arguments:
    """What the loop gets: addresses, sizes, strides in elements."""

    x: int
    out: int
    rows: int
    width: int
    table: int  # of every bfloat16 number; 0 in float32


_HALF, _ONE, _ZERO = np.float32(0.5), np.float32(1), np.float32(0)
_FAR = np.float32(14)  # further out the normal distribution's tail is 0 in float32
# Abramowitz & Stegun 7.1.26: erfc(z) = t * poly(t) * exp(-z²) within 1.5e-7, t = 1 / (1 + p z), z >= 0.
# z is |x| / sqrt(2); the root is in p and in the exponent, the half of erfc / 2 in the coefficients.
_P = np.float32(0.3275911 * 0.5**0.5)
_C = tuple(np.float32(c / 2) for c in (0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429))


def gelu(x: torch.Tensor, out: torch.Tensor) -> None:
    """GELU of ``x`` [T, N] into ``out``, which may be ``x``; float32 or bfloat16.

    ValueError for a tensor that isn't contiguous or of another dtype than the loop reads.
    """
    rows, width = x.shape
    half = x.dtype == torch.bfloat16
    (_lookup() if half else _computed()).run(
        team_for(x.numel()),
        x=address(x, "x"),
        out=address(out, "out", x.dtype),
        rows=rows,
        width=width,
        table=_table().data_ptr() if half else 0,
    )


def _gelu(x: Any) -> Any:
    """One number, without branches. The tail is taken off on the right and is what is left on the left."""
    size = min(abs(x), _FAR)
    t = _ONE / (_ONE + _P * size)
    tail = t * (_C[0] + t * (_C[1] + t * (_C[2] + t * (_C[3] + t * _C[4])))) * exp(-_HALF * size * size)
    return (_ZERO if x < _ZERO else x) - size * tail  # NaN comes through as x


@cache
def _computed() -> Task:
    function = njit(**LOOPS)(_gelu)

    def body(a: Any) -> None:
        part, parts = np.int64(thread()), np.int64(threads())
        count = a.rows * a.width
        first, last = count * part // parts, count * (part + 1) // parts
        x, out = float32s(a.x + first * 4), float32s(a.out + first * 4)
        for i in range(last - first):
            out[i] = function(x[i])

    return Task(body, Arguments, **LOOPS)


@cache
def _table() -> torch.Tensor:
    """The result for every bfloat16 number, by its bits. What layers meet of it fits into the L1 cache."""
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    return torch.where(every == -torch.inf, 0, F.gelu(every.double())).to(torch.bfloat16)


@cache
def _lookup() -> Task:
    """Four numbers at a time: one load and one store for them."""

    def pick(table: Any, four: Any, i: Any) -> Any:
        return np.int64(table[four >> 16 * i & 0xFFFF]) << 16 * i

    pick = njit(**OPTIONS)(pick)

    def body(a: Any) -> None:
        part, parts = np.int64(thread()), np.int64(threads())
        count, table = a.rows * a.width, uint16s(a.table)
        fours = count // 4
        first, last = fours * part // parts, fours * (part + 1) // parts
        x, out = int64s(a.x), int64s(a.out)
        for i in range(first, last):
            out[i] = pick(table, x[i], 0) | pick(table, x[i], 1) | pick(table, x[i], 2) | pick(table, x[i], 3)
        if part == 0:
            ones, results = uint16s(a.x), uint16s(a.out)
            for i in range(4 * fours, count):
                results[i] = table[ones[i]]

    return Task(body, Arguments)
