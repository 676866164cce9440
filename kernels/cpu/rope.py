"""The compiled CPU kernel of :mod:`trunkline.kernels.rope`."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch

from .elements import LOOPS, access, address, team_for
from .threads import Kernel, float32s, thread, threads


class Arguments:
    """The kernel's arguments: addresses, sizes, strides in elements."""

    qkv: int
    cos: int
    sin: int
    q_weight: int  # 0: no norms
    k_weight: int
    rows: int
    heads: int
    q_heads: int
    k_heads: int
    width: int  # of a head
    rotary_dim: int  # numbers of a head that are rotated
    eps: float


def rope(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_heads: int,
    k_heads: int,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    eps: float,
) -> None:
    """Rotate the first ``q_heads + k_heads`` heads of ``qkv`` [T, heads, D] in place; the caller checks shapes.

    ValueError for a tensor that isn't contiguous, or whose dtype isn't supported.
    """
    rows, heads, width = qkv.shape
    _kernel(qkv.dtype, q_weight is not None).run(
        team_for(qkv.numel()),
        qkv=address(qkv, "qkv"),
        cos=address(cos, "cos"),
        sin=address(sin, "sin"),
        q_weight=0 if q_weight is None else address(q_weight, "q_weight", torch.float32),
        k_weight=0 if k_weight is None else address(k_weight, "k_weight", torch.float32),
        rows=rows,
        heads=heads,
        q_heads=q_heads,
        k_heads=k_heads,
        width=width,
        rotary_dim=cos.shape[1],
        eps=eps,
    )


@cache
def _kernel(dtype: torch.dtype, normed: bool) -> Kernel:
    read, write, size = access(dtype)

    def body(a: Any) -> None:
        width, half = a.width, a.rotary_dim // 2
        worker, workers = np.int64(thread()), np.int64(threads())
        for t in range(a.rows * worker // workers, a.rows * (worker + 1) // workers):
            cos, sin = a.cos + t * 2 * half * size, a.sin + t * 2 * half * size
            for h in range(a.q_heads + a.k_heads):
                head = a.qkv + (t * a.heads + h) * width * size
                if normed:
                    weight = float32s(a.q_weight if h < a.q_heads else a.k_weight)
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

    return Kernel(body, Arguments, **LOOPS)
