"""Attention of several new tokens a row (prefill), over a cached prefix or none."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from trunkline.kernels.cpu.attention import flash, flash_pairs
from trunkline.kernels.cpu.attention.flash_arguments import sizes
from trunkline.kernels.cpu.elements import layout_of
from trunkline.kernels.cpu.processor import has_bfloat16_pairs
from trunkline.kernels.cpu.threads import team_size

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
    """The same by compiled loops, all rows at once, on torch's threads; float32 or bfloat16, sums in float32."""
    heads, key_dim = q.shape[1:]
    groups, value_dim = v.shape[1:]
    if q.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"the cpu backend computes in float32 and bfloat16, not {q.dtype}")
    q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
    which = np.ascontiguousarray(rows, dtype=np.int32)
    news = layout.q_start[which + 1] - layout.q_start[which]
    products = int(np.dot(news.astype(np.int64), layout.kv_len[which])) * heads * key_dim
    team = team_size(products > _SERIAL)
    pairs = q.dtype == torch.bfloat16 and flash_pairs.fits(key_dim, value_dim) and has_bfloat16_pairs()
    together = flash_pairs.TOGETHER if pairs else 1
    blocks = sizes(heads // groups, key_dim, value_dim, together)
    units = int((-(-news // blocks.queries)).sum()) * groups
    scratch = torch.empty(team * blocks.size, dtype=torch.uint8)
    sinks = None if sinks is None else sinks.detach().float().contiguous()
    flash.task(q.dtype, pairs).run(
        team,
        **_strided("q", q),
        **_strided("k", k),
        **_strided("v", v),
        keys=0 if keys is None else keys.data_ptr(),
        values=0 if values is None else values.data_ptr(),
        out=out.data_ptr(),
        sinks=0 if sinks is None else sinks.data_ptr(),
        **layout_of(layout, which),
        units=units,
        grain=max(1, units // (team * 32)),
        claimed=0,
        heads=heads,
        groups=groups,
        key_dim=key_dim,
        value_dim=value_dim,
        causal=int(causal),
        window=window,
        chunk=chunk,
        scratch=scratch.data_ptr(),
        scale=scale,
        softcap=softcap,
        **blocks._asdict(),
    )


def _strided(name: str, x: torch.Tensor) -> dict[str, int]:
    """Where a tensor starts, and bytes from token to token and from head to head."""
    return {name: x.data_ptr(), f"{name}_token": x.stride(0) * x.itemsize, f"{name}_head": x.stride(1) * x.itemsize}


_SERIAL = 1 << 19  # multiplications below which waking the other threads costs more than it saves


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
