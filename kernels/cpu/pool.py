"""The compiled CPU kernel of :mod:`trunkline.kernels.pool`."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch

from .elements import access, address, team_for
from .threads import Kernel, float32s, int64s, thread, threads


class Arguments:
    """The kernel's arguments: addresses, sizes, strides in elements."""

    x: int
    starts: int
    out: int
    rows: int  # sequences
    width: int
    weighted: int
    sqrt_length: int


def pool(hidden: torch.Tensor, starts: torch.Tensor, mode: str) -> torch.Tensor:
    """Pool each sequence's rows of ``hidden`` [T, H] -> [R, H] float32.

    ``starts`` int64 [R + 1]. ``mode`` is "mean", "weighted" or "sqrt", see :func:`.pool_reference`. ValueError
    for a tensor that isn't contiguous, or whose dtype isn't supported.
    """
    rows, width = len(starts) - 1, hidden.shape[1]
    out = torch.empty(rows, width)
    _kernel(hidden.dtype).run(
        team_for(hidden.numel()),
        x=address(hidden, "hidden"),
        starts=address(starts, "starts", torch.int64),
        out=out.data_ptr(),
        rows=rows,
        width=width,
        weighted=int(mode == "weighted"),
        sqrt_length=int(mode == "sqrt"),
    )
    return out


@cache
def _kernel(dtype: torch.dtype) -> Kernel:
    read, _, size = access(dtype)

    def body(a: Any) -> None:
        starts, width = int64s(a.starts), a.width
        worker, workers = np.int64(thread()), np.int64(threads())
        total = starts[a.rows]
        for r in range(a.rows):
            # Sequences differ in length. A thread takes those that begin in its equal share of all rows.
            if starts[r] * workers // total != worker:
                continue
            out, n = float32s(a.out + r * width * 4), starts[r + 1] - starts[r]
            x = a.x + starts[r] * width * size
            weights = np.float32(n * (n + 1)) * np.float32(0.5) if a.weighted != 0 else np.float32(n)
            divisor = np.sqrt(weights) if a.sqrt_length != 0 else weights
            for i in range(width):
                out[i] = np.float32(0)
            for t in range(n):
                weight = np.float32(t + 1 if a.weighted != 0 else 1)
                for i in range(width):
                    out[i] += weight * read(x + t * width * size, i)
            for i in range(width):
                out[i] /= divisor

    return Kernel(body, Arguments)  # without fast math: the same sums as one row after another in torch
