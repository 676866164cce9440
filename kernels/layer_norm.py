"""Layer norm of rows, with what a residual connection adds first."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from trunkline.kernels.cpu.elements import LOOPS, access, address, team_for
from trunkline.kernels.cpu.recording import hold
from trunkline.kernels.cpu.threads import Task, float32s, thread, threads

ARGUMENTS = [
    *((name, np.int64) for name in ("x", "residual", "weight", "bias", "out", "scratch", "rows", "width")),
    ("eps", np.float64),
]


def layer_norm_reference(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """Mean 0 and variance 1 over the last dimension of ``x + residual``, then ``* weight + bias``; float32 or wider.

    ``x`` and ``residual`` [T, H] of any float dtype, ``weight`` and ``bias`` [H] -> [T, H] of ``x``'s dtype.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    exact = x.to(wide) if residual is None else x.to(wide) + residual.to(wide)
    return F.layer_norm(exact, exact.shape[-1:], weight.to(wide), bias.to(wide), eps).to(x.dtype)


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """:func:`layer_norm_reference`, compiled, for float32 or bfloat16 ``x`` and ``residual``.

    ``weight`` and ``bias`` are float32. ``out``, like ``x``, takes the result; it may be ``x`` or ``residual``.
    """
    rows, width = x.shape
    if len(weight) != width or len(bias) != width:
        raise ValueError(f"weight and bias must have x's width {width}, not {len(weight)} and {len(bias)}")
    for name, other in (("residual", residual), ("out", out)):
        if other is not None and other.shape != x.shape:
            raise ValueError(f"{name} must have x's shape {tuple(x.shape)}, not {tuple(other.shape)}")
    out = torch.empty_like(x) if out is None else out
    team = team_for(x.numel())
    scratch = hold(torch.empty(team, width))
    arguments = (
        address(x, "x"),
        0 if residual is None else address(residual, "residual", x.dtype),
        address(weight, "weight", torch.float32),
        address(bias, "bias", torch.float32),
        address(out, "out", x.dtype),
        scratch.data_ptr(),
        rows,
        width,
        eps,
    )
    _task(x.dtype, residual is not None).run(arguments, team)
    return out


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

    return Task(body, ARGUMENTS, **LOOPS)
