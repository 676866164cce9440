"""The compiled CPU kernel of :mod:`trunkline.kernels.norm`."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch

from .elements import LOOPS, access, address, team_for
from .threads import Kernel, float32s, thread, threads


class Arguments:
    """The kernel's arguments: addresses, sizes, strides in elements."""

    x: int
    weight: int
    residual: int  # 0: none
    out: int
    rows: int
    width: int
    eps: float


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None, out: torch.Tensor
) -> None:
    """RMS norm of ``x`` [T, H], plus ``residual``, into ``out``; the caller checks shapes.

    ValueError for a tensor that isn't contiguous, or whose dtype isn't supported.
    """
    rows, width = x.shape
    _kernel(x.dtype, residual is not None).run(
        team_for(x.numel()),
        x=address(x, "x"),
        weight=address(weight, "weight", torch.float32),
        residual=0 if residual is None else address(residual, "residual", x.dtype),
        out=address(out, "out", x.dtype),
        rows=rows,
        width=width,
        eps=eps,
    )


@cache
def _kernel(dtype: torch.dtype, added: bool) -> Kernel:
    read, write, size = access(dtype)

    def body(a: Any) -> None:
        width, weight = a.width, float32s(a.weight)
        worker, workers = np.int64(thread()), np.int64(threads())
        for t in range(a.rows * worker // workers, a.rows * (worker + 1) // workers):
            row = t * width * size
            x, out, residual = a.x + row, a.out + row, a.residual + row
            total = np.float32(0)
            for i in range(width):
                total += read(x, i) * read(x, i)
            scale = np.float32(1) / np.sqrt(total / np.float32(width) + np.float32(a.eps))
            for i in range(width):
                normed = read(x, i) * scale * weight[i]
                write(out, i, normed + read(residual, i) if added else normed)

    return Kernel(body, Arguments, **LOOPS)
