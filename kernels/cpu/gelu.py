"""The compiled CPU kernels of :mod:`trunkline.kernels.activation`; exact GELU of bfloat16 is a table."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numba import njit

from .elements import LOOPS, access, address, team_for
from .glu import exp, sigmoid_unit
from .threads import OPTIONS, Kernel, int64s, thread, threads, uint16s


class Arguments:
    """The kernel's arguments: addresses, sizes, strides in elements."""

    x: int
    out: int
    rows: int
    width: int
    table: int  # GELU of all 65,536 bfloat16 numbers, 128 KiB; 0 if it isn't used


_HALF, _ONE, _ZERO = np.float32(0.5), np.float32(1), np.float32(0)
_FAR = np.float32(14)  # beyond, the tail of the normal distribution is 0 in float32
# Abramowitz & Stegun 7.1.26: erfc(z) = t * poly(t) * exp(-z²) within 1.5e-7, t = 1 / (1 + p z), z >= 0.
# Here z = |x| / sqrt(2): the factor 1 / sqrt(2) is merged into p and the exponent, the 1/2 of erfc / 2 into
# the coefficients.
_P = np.float32(0.3275911 * 0.5**0.5)
_C = tuple(np.float32(c / 2) for c in (0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429))


def activate(x: torch.Tensor, activation: str, out: torch.Tensor) -> None:
    """An activation of ``x`` [T, N] into ``out``, which may be ``x``; float32 or bfloat16.

    ValueError for a tensor that isn't contiguous, or whose dtype isn't supported.
    """
    rows, width = x.shape
    looked_up = activation == "gelu" and x.dtype == torch.bfloat16
    (_lookup() if looked_up else _computed(activation, x.dtype)).run(
        team_for(x.numel()),
        x=address(x, "x"),
        out=address(out, "out", x.dtype),
        rows=rows,
        width=width,
        table=_table().data_ptr() if looked_up else 0,
    )


def _gelu(x: Any) -> Any:
    """GELU of one number, without branches: ``x - |x| tail`` for positive x, ``-|x| tail`` for negative x.

    ``tail`` is the normal distribution's mass beyond |x|.
    """
    size = min(abs(x), _FAR)
    t = _ONE / (_ONE + _P * size)
    tail = t * (_C[0] + t * (_C[1] + t * (_C[2] + t * (_C[3] + t * _C[4])))) * exp(-_HALF * size * size)
    return (_ZERO if x < _ZERO else x) - size * tail  # a NaN is passed on by x


@cache
def _computed(activation: str, dtype: torch.dtype) -> Kernel:
    read, write, size = access(dtype)
    function = njit(**LOOPS)(_gelu) if activation == "gelu" else sigmoid_unit(activation)

    def body(a: Any) -> None:
        worker, workers = np.int64(thread()), np.int64(threads())
        # Row by row: a vectorised loop computes the numbers at its end by other code, with other bits.
        for t in range(a.rows * worker // workers, a.rows * (worker + 1) // workers):
            x, out = a.x + t * a.width * size, a.out + t * a.width * size
            for i in range(a.width):
                write(out, i, function(read(x, i)))

    return Kernel(body, Arguments, **LOOPS)


@cache
def _table() -> torch.Tensor:
    """GELU of every bfloat16 number, indexed by its bits.

    128 KiB in all; the entries for the few exponents that occur in practice fit in the L1 cache.
    """
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    return torch.where(every == -torch.inf, 0, F.gelu(every.double())).to(torch.bfloat16)


@cache
def _lookup() -> Kernel:
    """Looks up four numbers at a time: one load and one store of 64 bits."""

    def look_up(table: Any, four: Any, i: Any) -> Any:
        return np.int64(table[four >> 16 * i & 0xFFFF]) << 16 * i

    look_up = njit(**OPTIONS)(look_up)

    def body(a: Any) -> None:
        worker, workers = np.int64(thread()), np.int64(threads())
        count, table = a.rows * a.width, uint16s(a.table)
        fours = count // 4
        first, last = fours * worker // workers, fours * (worker + 1) // workers
        x, out = int64s(a.x), int64s(a.out)
        for i in range(first, last):
            out[i] = (
                look_up(table, x[i], 0) | look_up(table, x[i], 1) | look_up(table, x[i], 2) | look_up(table, x[i], 3)
            )
        if worker == 0:
            ones, results = uint16s(a.x), uint16s(a.out)
            for i in range(4 * fours, count):
                results[i] = table[ones[i]]

    return Kernel(body, Arguments)
