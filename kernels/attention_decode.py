"""Paged decode attention: one query a row over keys and values that lie scattered in the pool."""

from __future__ import annotations

import numpy as np
import torch


def decode_reference(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    table: np.ndarray,
    table_row: np.ndarray,
    kv_len: np.ndarray,
    out: torch.Tensor,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    chunk: int = 0,
) -> None:
    """Plain torch: gather each row's visible keys, softmax in float32 or wider.

    ``q`` [R, H, D], ``keys`` [slots, KV, D], ``values`` [slots, KV, Dv], ``table`` int32
    [rows, max_len], ``table_row`` and ``kv_len`` int32 [R]; fills ``out`` [R, H, Dv].
    The query of row ``r`` stands at position ``kv_len[r] - 1``.
    """
    rows, heads, _ = q.shape
    groups = keys.shape[1]
    exact = torch.promote_types(q.dtype, torch.float32)
    for r in range(rows):
        length = int(kv_len[r])
        first = first_visible(length - 1, window, chunk)
        slots = torch.from_numpy(table[table_row[r], first:length]).to(keys.device)
        k = keys.index_select(0, slots).to(exact)  # [n, KV, D]
        v = values.index_select(0, slots).to(exact)
        query = q[r].to(exact).view(groups, heads // groups, -1)
        scores = torch.einsum("ghd,ngd->ghn", query, k).reshape(heads, -1) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        if sinks is not None:
            scores = torch.cat([scores, sinks.to(exact)[:, None]], dim=-1)
        weights = scores.softmax(-1)[:, : length - first].view(groups, heads // groups, -1)
        out[r] = torch.einsum("ghn,ngd->ghd", weights, v).reshape(heads, -1).to(out.dtype)


def first_visible(position: int, window: int, chunk: int) -> int:
    """First key that the query at ``position`` sees under a causal window or chunk (0 = none)."""
    first = max(0, position + 1 - window) if window else 0
    return max(first, position // chunk * chunk) if chunk else first
