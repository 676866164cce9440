"""The compiled CPU kernel of :mod:`trunkline.kernels.glu`."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from numba import njit

from .elements import LOOPS, access, address, float_of_bits, team_for
from .threads import Kernel, thread, threads


class Arguments:
    """The kernel's arguments: addresses, sizes, strides in elements."""

    gate_up: int
    out: int
    rows: int
    width: int


def glu(gate_up: torch.Tensor, activation: str, out: torch.Tensor) -> None:
    """``activation(gate) * up`` of ``gate_up`` [T, 2 * I], into ``out`` [T, I]; "silu" or "gelu_tanh".

    ValueError for a tensor that isn't contiguous, or whose dtype isn't supported.
    """
    rows, width = out.shape
    _kernel(gate_up.dtype, activation).run(
        team_for(gate_up.numel()),
        gate_up=address(gate_up, "gate_up"),
        out=address(out, "out", gate_up.dtype),
        rows=rows,
        width=width,
    )


_LOG2E = np.float32(1.44269504)
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
_P = tuple(np.float32(c) for c in (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1))
_HALF, _ONE, _TWO = np.float32(0.5), np.float32(1), np.float32(2)
_LIMIT = np.float32(87)
_GELU_SCALE, _GELU_CUBE = np.float32(0.7978845608), np.float32(0.044715)


def _exp(x: Any) -> Any:
    """``exp(x)`` within 2 ulp, as in Cephes' ``expf``, without branches, so that the loop around it is vectorised."""
    x = min(max(x, -_LIMIT), _LIMIT)
    n = np.floor(x * _LOG2E + _HALF)
    r = x - n * _LN2_HIGH - n * _LN2_LOW
    p = ((((_P[0] * r + _P[1]) * r + _P[2]) * r + _P[3]) * r + _P[4]) * r + _HALF
    power = float_of_bits((np.int32(n) + np.int32(127)) << np.int32(23))
    return (p * r * r + r + _ONE) * power


exp = njit(**LOOPS)(_exp)


def _silu(x: Any) -> Any:
    return x / (_ONE + exp(-x))


def _gelu_tanh(x: Any) -> Any:
    return x / (_ONE + exp(-_TWO * _GELU_SCALE * (x + _GELU_CUBE * x * x * x)))


def sigmoid_unit(activation: str) -> Any:
    """Compiled "silu" or "gelu_tanh" of one number, without branches."""
    return njit(**LOOPS)(_silu if activation == "silu" else _gelu_tanh)


@cache
def _kernel(dtype: torch.dtype, activation: str) -> Kernel:
    read, write, size = access(dtype)
    function = sigmoid_unit(activation)

    def body(a: Any) -> None:
        width = a.width
        worker, workers = np.int64(thread()), np.int64(threads())
        for t in range(a.rows * worker // workers, a.rows * (worker + 1) // workers):
            gate, out = a.gate_up + 2 * t * width * size, a.out + t * width * size
            up = gate + width * size
            for i in range(width):
                write(out, i, function(read(gate, i)) * read(up, i))

    return Kernel(body, Arguments, **LOOPS)
