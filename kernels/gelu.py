"""GELU with the exact normal distribution, by an error function that loops over vectors can do."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numba import njit

from .elements import LOOPS, access, address, team_for
from .glu import exp
from .threads import Task, thread, threads

ARGUMENTS = [(name, np.int64) for name in ("x", "out", "rows", "width")]

_HALF, _ONE, _ZERO = np.float32(0.5), np.float32(1), np.float32(0)
_FAR = np.float32(14)  # further out the normal distribution's tail is 0 in float32
# Abramowitz & Stegun 7.1.26: erfc(z) = t * poly(t) * exp(-z²) within 1.5e-7, t = 1 / (1 + p z), z >= 0.
# z is |x| / sqrt(2); the root is in p and in the exponent, the half of erfc / 2 in the coefficients.
_P = np.float32(0.3275911 * 0.5**0.5)
_C = tuple(np.float32(c / 2) for c in (0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429))


def gelu_reference(x: torch.Tensor) -> torch.Tensor:
    """``x`` times the probability that a normal number is below it; any float dtype and shape."""
    return F.gelu(x)


def gelu(x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """:func:`gelu_reference` of ``x`` [T, N], float32 or bfloat16, compiled; at most 1e-6 off in float32.

    ``out``, like ``x``, takes the result. It may be ``x``, but that is several times slower.
    """
    rows, width = x.shape
    if out is not None and out.shape != x.shape:
        raise ValueError(f"out must have x's shape {tuple(x.shape)}, not {tuple(out.shape)}")
    out = torch.empty_like(x) if out is None else out
    arguments = (address(x, "x"), address(out, "out", x.dtype), rows, width)
    _task(x.dtype).run(arguments, team_for(x.numel()))
    return out


def _gelu(x: Any) -> Any:
    """One number, without branches. The tail is taken off on the right and is what is left on the left."""
    size = min(abs(x), _FAR)
    t = _ONE / (_ONE + _P * size)
    tail = t * (_C[0] + t * (_C[1] + t * (_C[2] + t * (_C[3] + t * _C[4])))) * exp(-_HALF * size * size)
    return (_ZERO if x < _ZERO else x) - size * tail  # NaN comes through as x


@cache
def _task(dtype: torch.dtype) -> Task:
    read, write, size = access(dtype)
    function = njit(**LOOPS)(_gelu)

    def body(a: Any) -> None:
        part, parts = np.int64(thread()), np.int64(threads())
        count = a.rows * a.width
        first, last = count * part // parts, count * (part + 1) // parts
        x, out = a.x + first * size, a.out + first * size
        for i in range(last - first):
            write(out, i, function(read(x, i)))

    return Task(body, ARGUMENTS, **LOOPS)
