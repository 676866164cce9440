"""Paged decode attention: rows with one query over keys that lie scattered in the pool."""

from __future__ import annotations

import numpy as np
import torch

from trunkline.kernels.cpu.attention import paged
from trunkline.kernels.cpu.elements import layout_of
from trunkline.kernels.cpu.recording import hold
from trunkline.kernels.cpu.threads import team_size

from . import attention_extend
from .layout import Layout

_SERIAL = 1 << 19  # multiplications below which waking the other threads costs more than it saves


def decode_reference(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    layout: Layout,
    which: np.ndarray,
    out: torch.Tensor,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    chunk: int = 0,
) -> None:
    """Plain torch: gather each row's keys and attend, in float32 or wider.

    ``q`` [T, H, D], ``keys`` [slots, KV, D] and ``values`` [slots, KV, Dv] (one layer of the pool,
    new tokens included), ``which`` int32 [N]: the rows of ``layout`` to attend for, of one query each.
    Fills ``out`` [T, H, Dv] at those rows' tokens. Always causal.
    """
    exact = torch.promote_types(q.dtype, torch.float32)
    for r in which:
        tokens = slice(int(layout.q_start[r]), int(layout.q_start[r]) + 1)
        slots = torch.from_numpy(layout.table[layout.table_row[r], : layout.kv_len[r]]).to(keys.device)
        k, v = keys.index_select(0, slots).to(exact), values.index_select(0, slots).to(exact)
        seen = attention_extend.visible(1, len(k), True, window, chunk, q.device)
        row = attention_extend.attend(q[tokens].to(exact), k, v, seen, scale=scale, softcap=softcap, sinks=sinks)
        out[tokens] = row.to(out.dtype)


def decode_cpu(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    layout: Layout,
    which: np.ndarray,
    out: torch.Tensor,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    chunk: int = 0,
) -> None:
    """The same by compiled loops over the pool, on torch's threads; float32 or bfloat16, sums in float32."""
    heads, key_dim = q.shape[1:]
    groups, value_dim = values.shape[1:]
    if q.stride(2) != 1:
        q = q.contiguous()
    which = np.ascontiguousarray(which, dtype=np.int32)
    shares = team_size(len(which) * heads * key_dim * int(layout.kv_len.max()) > _SERIAL)
    size = paged.scratch_bytes(heads, key_dim, value_dim)
    scratch = hold(torch.empty(shares * size, dtype=torch.uint8))
    sinks = None if sinks is None else sinks.detach().float().contiguous()
    task = paged.task(key_dim, value_dim, q.dtype == torch.bfloat16)
    arguments: dict[str, float] = {
        "q": q.data_ptr(),
        "q_token": q.stride(0),
        "q_head": q.stride(1),
        "keys": keys.data_ptr(),
        "values": values.data_ptr(),
        "out": out.data_ptr(),
        "scratch": scratch.data_ptr(),
        "sinks": 0 if sinks is None else sinks.data_ptr(),
        **layout_of(layout, which),
        "rows": len(which),
        "heads": heads,
        "groups": groups,
        "window": window,
        "chunk": chunk,
        "scale": scale,
        "softcap": softcap,
    }
    task.run(shares, **arguments, shares=shares)
    if shares > 1:
        task.run(1, True, **arguments, shares=-shares)
