"""Root mean square normalisation of rows."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch

from trunkline.kernels.cpu.elements import LOOPS, access, address, team_for
from trunkline.kernels.cpu.threads import Task, float32s, thread, threads

ARGUMENTS = [
    *((name, np.int64) for name in ("x", "weight", "residual", "out", "rows", "width")),
    ("eps", np.float64),
]


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """``x / sqrt(mean(x**2) + eps) * weight`` over the last dimension, in float32 or wider.

    ``x`` [T, H] of any float dtype, ``weight`` [H] -> [T, H] of ``x``'s dtype.
    """
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + eps)
    return (exact * scale * weight).to(x.dtype)


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """:func:`rms_norm_reference`, compiled: ``x`` [T, H] float32 or bfloat16, ``weight`` [H] float32.

    ``residual``, like ``x``, is added; ``out``, like ``x``, takes the result and may be ``residual``.
    """
    rows, width = x.shape
    if len(weight) != width:
        raise ValueError(f"weight must have x's width {width}, not {len(weight)}")
    for name, other in (("residual", residual), ("out", out)):
        if other is not None and other.shape != x.shape:
            raise ValueError(f"{name} must have x's shape {tuple(x.shape)}, not {tuple(other.shape)}")
    out = torch.empty_like(x) if out is None else out
    arguments = (
        address(x, "x"),
        address(weight, "weight", torch.float32),
        0 if residual is None else address(residual, "residual", x.dtype),
        address(out, "out", x.dtype),
        rows,
        width,
        eps,
    )
    _task(x.dtype, residual is not None).run(arguments, team_for(x.numel()))
    return out


@cache
def _task(dtype: torch.dtype, added: bool) -> Task:
    read, write, size = access(dtype)

    def body(a: Any) -> None:
        width, weight = a.width, float32s(a.weight)
        part, parts = np.int64(thread()), np.int64(threads())
        for t in range(a.rows * part // parts, a.rows * (part + 1) // parts):
            row = t * width * size
            x, out, residual = a.x + row, a.out + row, a.residual + row
            total = np.float32(0)
            for i in range(width):
                total += read(x, i) * read(x, i)
            scale = np.float32(1) / np.sqrt(total / np.float32(width) + np.float32(a.eps))
            for i in range(width):
                normed = read(x, i) * scale * weight[i]
                write(out, i, normed + read(residual, i) if added else normed)

    return Task(body, ARGUMENTS, **LOOPS)
