"""Attention of several new tokens a row (prefill), over a cached prefix or none."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from .layout import Layout


def extend_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keys: torch.Tensor | None,
    values: torch.Tensor | None,
    layout: Layout,
    rows: Sequence[int] | np.ndarray,
    out: torch.Tensor,
    *,
    scale: float,
    causal: bool = True,
    window: int = 0,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    chunk: int = 0,
) -> None:
    """Plain torch, row by row, all scores of a row in memory.

    ``q`` [T, H, D], ``k`` [T, KV, D] and ``v`` [T, KV, Dv] hold the new tokens of all rows;
    ``keys`` and ``values`` are one layer of the pool, the new tokens already written, or None.
    Fills ``out`` [T, H, Dv] at the tokens of ``rows``. Non-causal rows have no cached prefix.
    """
    exact = torch.promote_types(q.dtype, torch.float32)
    for r in rows:
        tokens = slice(int(layout.q_start[r]), int(layout.q_start[r + 1]))
        row_k, row_v = row_keys(k, v, keys, values, layout, r)
        seen = visible(tokens.stop - tokens.start, len(row_k), causal, window, chunk, q.device)
        out[tokens] = attend(
            q[tokens].to(exact), row_k.to(exact), row_v.to(exact), seen, scale=scale, softcap=softcap, sinks=sinks
        ).to(out.dtype)


def extend_cpu(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keys: torch.Tensor | None,
    values: torch.Tensor | None,
    layout: Layout,
    rows: Sequence[int] | np.ndarray,
    out: torch.Tensor,
    *,
    scale: float,
    causal: bool = True,
    window: int = 0,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    chunk: int = 0,
) -> None:
    """The same by torch's flash attention for the CPU; soft caps and sinks are written out in slices."""
    for r in rows:
        tokens = slice(int(layout.q_start[r]), int(layout.q_start[r + 1]))
        n = tokens.stop - tokens.start
        row_k, row_v = row_keys(k, v, keys, values, layout, r)
        m = len(row_k)
        if softcap or sinks is not None:
            _attend_in_slices(q[tokens], row_k, row_v, out[tokens], scale, causal, window, softcap, sinks, chunk)
            continue
        plain = not (window and window < m) and not (chunk and chunk < m)
        mask = None if plain and (not causal or n == m) else _bias(layout, n, m, causal, window, chunk, q.dtype)
        out[tokens] = _flash(q[tokens], row_k, row_v, mask, causal and mask is None, scale)


def _flash(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, causal: bool, scale: float
) -> torch.Tensor:
    """[n, H, D], [m, KV, D], [m, KV, Dv] -> [n, H, Dv]. Widths that differ are padded: flash needs equal ones."""
    width = v.shape[2]
    if q.shape[2] > width:
        v = F.pad(v, (0, q.shape[2] - width))
    elif q.shape[2] < width:
        q, k = F.pad(q, (0, width - q.shape[2])), F.pad(k, (0, width - k.shape[2]))
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    result = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return result[0].transpose(0, 1)[..., :width]


def _attend_in_slices(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
    sinks: torch.Tensor | None,
    chunk: int,
) -> None:
    """``attend`` for a slice of queries at a time, so that scores take at most ``_SCORES`` elements."""
    n, heads, _ = q.shape
    m = len(k)
    k, v = k.float(), v.float()
    step = max(1, _SCORES // (heads * m))
    for begin in range(0, n, step):
        end = min(begin + step, n)
        high = m - n + end if causal else m
        low = max(0, m - n + begin + 1 - window) if window else 0
        seen = visible(n, m, causal, window, chunk, q.device)[begin:end, low:high]
        part = attend(q[begin:end].float(), k[low:high], v[low:high], seen, scale=scale, softcap=softcap, sinks=sinks)
        out[begin:end] = part.to(out.dtype)


_SCORES = 1 << 22


def _bias(layout: Layout, n: int, m: int, causal: bool, window: int, chunk: int, dtype: torch.dtype) -> torch.Tensor:
    """``visible`` as what is added to scores: 0 or -inf, [n, m] on the CPU. All layers of a pass share it."""
    key = (n, m, causal, window, chunk, dtype)
    if key not in layout.masks:
        seen = visible(n, m, causal, window, chunk, torch.device("cpu"))
        layout.masks[key] = torch.zeros(n, m, dtype=dtype).masked_fill_(~seen, -torch.inf)
    return layout.masks[key]


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seen: torch.Tensor,
    *,
    scale: float,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """``softmax(q kᵀ) v`` with everything written out: [n, H, D], [m, KV, D], [m, KV, Dv] -> [n, H, Dv].

    ``seen`` bool [n, m]. ``sinks`` [H] is one more column of the softmax, without a value.
    """
    n, heads, _ = q.shape
    groups = k.shape[1]
    query = q.view(n, groups, heads // groups, -1).permute(1, 2, 0, 3)  # [KV, H/KV, n, D]
    scores = query @ k.permute(1, 2, 0)[:, None] * scale  # [KV, H/KV, n, m]
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen, -torch.inf)
    if sinks is not None:
        column = sinks.to(scores.dtype).view(groups, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], dim=-1)
    weights = scores.softmax(-1)[..., : len(k)]
    return (weights @ v.permute(1, 0, 2)[:, None]).permute(2, 0, 1, 3).reshape(n, heads, -1)


def row_keys(
    k: torch.Tensor,
    v: torch.Tensor,
    keys: torch.Tensor | None,
    values: torch.Tensor | None,
    layout: Layout,
    row: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """All keys and values of a row, [kv_len, KV, D] and [kv_len, KV, Dv].

    Views of the new ones when the row has no cached prefix, else a copy from the pool.
    """
    start, stop, length = int(layout.q_start[row]), int(layout.q_start[row + 1]), int(layout.kv_len[row])
    if length == stop - start or keys is None or values is None:
        return k[start:stop], v[start:stop]
    slots = torch.from_numpy(layout.table[layout.table_row[row], :length]).to(keys.device)
    return keys.index_select(0, slots), values.index_select(0, slots)


def visible(n: int, m: int, causal: bool, window: int, chunk: int, device: torch.device) -> torch.Tensor:
    """Which of ``m`` keys each of the last ``n`` positions sees, bool [n, m]."""
    position = torch.arange(m - n, m, device=device)[:, None]
    key = torch.arange(m, device=device)
    distance = position - key
    seen = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    if window:
        seen &= distance.abs() < window
    if chunk:
        seen &= position // chunk == key // chunk
    return seen
