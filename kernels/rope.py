"""Rotary position embedding of queries and keys, with their norms where a model has them."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch

from trunkline.kernels.cpu.elements import LOOPS, access, address, team_for
from trunkline.kernels.cpu.threads import Task, float32s, thread, threads

from .norm import rms_norm_reference

ARGUMENTS = [
    *((name, np.int64) for name in ("qkv", "cos", "sin", "q_weight", "k_weight")),
    *((name, np.int64) for name in ("rows", "heads", "queries", "keys", "width", "turned")),
    ("eps", np.float64),
]


def rope_reference(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    queries: int,
    keys: int,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    eps: float = 0.0,
) -> None:
    """Turn the first ``queries + keys`` heads of ``qkv`` [T, heads, D] in place.

    ``cos`` and ``sin`` [T, R], R <= D even: the first R numbers of a head are turned, number i
    together with number i + R / 2. With ``q_weight`` and ``k_weight`` [D] float32, each head is
    RMS-normalised first.
    """
    exact = qkv[:, : queries + keys].to(torch.promote_types(qkv.dtype, torch.float32))
    if q_weight is not None and k_weight is not None:
        normed = [rms_norm_reference(exact[:, :queries], q_weight, eps)]
        normed.append(rms_norm_reference(exact[:, queries:], k_weight, eps))
        exact = torch.cat(normed, dim=1)
    width = cos.shape[-1]
    turned = exact[..., :width]
    low, high = turned.chunk(2, dim=-1)
    turned = turned * cos[:, None] + torch.cat([-high, low], dim=-1) * sin[:, None]
    qkv[:, : queries + keys] = torch.cat([turned, exact[..., width:]], dim=-1).to(qkv.dtype)


def rope(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    queries: int,
    keys: int,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    eps: float = 0.0,
) -> None:
    """:func:`rope_reference`, compiled; all of one dtype, float32 or bfloat16."""
    rows, heads, width = qkv.shape
    if cos.shape != sin.shape or cos.dtype != qkv.dtype or sin.dtype != qkv.dtype or len(cos) != rows:
        raise ValueError("cos and sin must be [T, R] of qkv's dtype")
    if cos.shape[1] > width or cos.shape[1] % 2:
        raise ValueError("the rotary width must be even and at most the head's")
    if (q_weight is None) != (k_weight is None):
        raise ValueError("queries and keys are normalised both or not at all")
    if q_weight is not None and k_weight is not None and not len(q_weight) == len(k_weight) == width:
        raise ValueError(f"q_weight and k_weight must have the head's width {width}")
    arguments = (
        address(qkv, "qkv"),
        address(cos, "cos"),
        address(sin, "sin"),
        0 if q_weight is None else address(q_weight, "q_weight", torch.float32),
        0 if k_weight is None else address(k_weight, "k_weight", torch.float32),
        rows,
        heads,
        queries,
        keys,
        width,
        cos.shape[1],
        eps,
    )
    _task(qkv.dtype, q_weight is not None).run(arguments, team_for(qkv.numel()))


@cache
def _task(dtype: torch.dtype, normed: bool) -> Task:
    read, write, size = access(dtype)

    def body(a: Any) -> None:
        width, half = a.width, a.turned // 2
        part, parts = np.int64(thread()), np.int64(threads())
        for t in range(a.rows * part // parts, a.rows * (part + 1) // parts):
            cos, sin = a.cos + t * 2 * half * size, a.sin + t * 2 * half * size
            for h in range(a.queries + a.keys):
                head = a.qkv + (t * a.heads + h) * width * size
                if normed:
                    weight = float32s(a.q_weight if h < a.queries else a.k_weight)
                    total = np.float32(0)
                    for i in range(width):
                        total += read(head, i) * read(head, i)
                    scale = np.float32(1) / np.sqrt(total / np.float32(width) + np.float32(a.eps))
                    for i in range(width):
                        write(head, i, read(head, i) * scale * weight[i])
                high = head + half * size
                for i in range(half):
                    x, y = read(head, i), read(high, i)
                    write(head, i, x * read(cos, i) - y * read(sin, i))
                    write(high, i, y * read(cos, half + i) + x * read(sin, half + i))

    return Task(body, ARGUMENTS, **LOOPS)
