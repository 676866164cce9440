"""Pooling: one vector per sequence, from its packed hidden rows."""

from __future__ import annotations

import torch

from trunkline.kernels.cpu import pool as compiled

MODES = ("mean", "max", "weighted", "sqrt", "first", "last")


def pool_reference(hidden: torch.Tensor, starts: torch.Tensor, mode: str) -> torch.Tensor:
    """Pool ``hidden`` [T, H] of any float dtype -> [R, H] float32, on ``hidden``'s device.

    Sequence ``r`` has the rows ``[starts[r], starts[r + 1])``, at least one; ``starts`` is int64
    [R + 1], from 0 to T. ``mode`` is one of :data:`MODES`, as sentence-transformers' ``Pooling`` defines
    them: "mean"; "max", elementwise; "weighted", the mean with weight i for the i-th row, from 1 on;
    "sqrt", the sum divided by the square root of the number of rows; "first"; "last". ValueError for
    an unknown mode, other shapes, and for ``starts`` on the CPU that don't increase from 0 to T.
    """
    check(hidden, starts, mode)
    starts = starts.to(hidden.device)
    if mode in ("first", "last"):
        return _pick(hidden, starts, mode)
    lengths = starts.diff()
    count, width = len(lengths), hidden.shape[1]
    row = torch.repeat_interleave(torch.arange(count, device=hidden.device), lengths, output_size=len(hidden))
    exact = hidden.float()
    if mode == "max":
        return exact.new_empty(count, width).scatter_reduce_(
            0, row[:, None].expand_as(exact), exact, "amax", include_self=False
        )
    weights = torch.ones(len(row), device=hidden.device)
    if mode == "weighted":
        weights = (torch.arange(len(row), device=hidden.device) - starts[row] + 1).float()
        exact = exact * weights[:, None]
    sums = exact.new_zeros(count, width).index_add_(0, row, exact)
    totals = weights.new_zeros(count).index_add_(0, row, weights)[:, None]
    return sums / (totals.sqrt() if mode == "sqrt" else totals)


def pool_cpu(hidden: torch.Tensor, starts: torch.Tensor, mode: str) -> torch.Tensor:
    """:func:`pool_reference` of tensors on the CPU, with the same arguments, result and errors.

    "mean", "weighted" and "sqrt" of float32 and bfloat16 tensors run compiled.
    """
    if hidden.dtype not in (torch.float32, torch.bfloat16) or mode in ("max", "first", "last"):
        return pool_reference(hidden, starts, mode)
    check(hidden, starts, mode)
    return compiled.pool(hidden.contiguous(), starts.contiguous(), mode)


def _pick(hidden: torch.Tensor, starts: torch.Tensor, mode: str) -> torch.Tensor:
    return hidden.index_select(0, starts[:-1] if mode == "first" else starts[1:] - 1).float()


def check(hidden: torch.Tensor, starts: torch.Tensor, mode: str) -> None:
    """ValueError for arguments that don't fit. The values of ``starts`` are read on the CPU only.

    On another device, reading them would wait for the device.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, not {mode!r}")
    if hidden.ndim != 2 or starts.ndim != 1 or starts.dtype != torch.int64 or len(starts) == 0:
        raise ValueError(f"hidden must be [T, H] and starts int64 [R + 1], not {hidden.shape} and {starts.shape}")
    if starts.is_cpu and (int(starts[0]) or int(starts[-1]) != len(hidden) or not bool((starts.diff() > 0).all())):
        raise ValueError(f"starts must increase from 0 to {len(hidden)}, the number of hidden rows")
