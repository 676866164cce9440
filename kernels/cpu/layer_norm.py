"""The compiled CPU kernel of :mod:`trunkline.kernels.layer_norm`."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch

from .elements import LOOPS, access, address, team_for
from .launches.memory import keep_alive
from .threads import Kernel, float32s, thread, threads


class Arguments:
    """The kernel's arguments: addresses, sizes, strides in elements."""

    x: int
    residual: int  # 0: none
    weight: int
    bias: int
    out: int
    scratch: int
    rows: int
    width: int
    eps: float


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """Layer norm of ``x + residual`` [T, H], into ``out``; the caller checks shapes.

    ValueError for a tensor that isn't contiguous, or whose dtype isn't supported.
    """
    rows, width = x.shape
    team = team_for(x.numel())
    scratch = keep_alive(torch.empty(team, width))
    _kernel(x.dtype, residual is not None).run(
        team,
        x=address(x, "x"),
        residual=0 if residual is None else address(residual, "residual", x.dtype),
        weight=address(weight, "weight", torch.float32),
        bias=address(bias, "bias", torch.float32),
        out=address(out, "out", x.dtype),
        scratch=scratch.data_ptr(),
        rows=rows,
        width=width,
        eps=eps,
    )


@cache
def _kernel(dtype: torch.dtype, added: bool) -> Kernel:
    read, write, size = access(dtype)

    def body(a: Any) -> None:
        width, weight, bias = a.width, float32s(a.weight), float32s(a.bias)
        worker, workers = np.int64(thread()), np.int64(threads())
        # The row in float32: bfloat16 is converted once, not three times.
        sums = float32s(a.scratch + worker * width * 4)
        for t in range(a.rows * worker // workers, a.rows * (worker + 1) // workers):
            row = t * width * size
            x, residual, out = a.x + row, a.residual + row, a.out + row
            total = np.float32(0)
            for i in range(width):
                number = read(x, i) + read(residual, i) if added else read(x, i)
                sums[i] = number
                total += number
            mean = total / np.float32(width)
            squares = np.float32(0)
            for i in range(width):
                squares += (sums[i] - mean) * (sums[i] - mean)
            scale = np.float32(1) / np.sqrt(squares / np.float32(width) + np.float32(a.eps))
            for i in range(width):
                write(out, i, (sums[i] - mean) * scale * weight[i] + bias[i])

    return Kernel(body, Arguments, **LOOPS)
