"""The loop of :mod:`trunkline.kernels.layer_norm`."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch

from .elements import LOOPS, access, address, team_for
from .recording import hold
from .threads import Task, float32s, thread, threads


class Arguments:
    """What the loop gets: addresses, sizes, strides in elements."""

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
    """Layer norm of ``x + residual`` [T, H], into ``out``; shapes are the caller's to check.

    ValueError for a tensor that isn't contiguous or of another dtype than the loop reads.
    """
    rows, width = x.shape
    team = team_for(x.numel())
    scratch = hold(torch.empty(team, width))
    _task(x.dtype, residual is not None).run(
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
def _task(dtype: torch.dtype, added: bool) -> Task:
    read, write, size = access(dtype)

    def body(a: Any) -> None:
        width, weight, bias = a.width, float32s(a.weight), float32s(a.bias)
        part, parts = np.int64(thread()), np.int64(threads())
        sums = float32s(a.scratch + part * width * 4)  # a row in float32, so that it is widened once
        for t in range(a.rows * part // parts, a.rows * (part + 1) // parts):
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

    return Task(body, Arguments, **LOOPS)
