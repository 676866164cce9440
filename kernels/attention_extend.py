"""Attention of rows with several new tokens (prefill), with or without a cached prefix."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from trunkline.kernels.cpu.attention import flash, flash_pairs
from trunkline.kernels.cpu.attention.flash_arguments import Blocks, sizes
from trunkline.kernels.cpu.elements import layout_of
from trunkline.kernels.cpu.launches.memory import keep_alive, scratch_memory
from trunkline.kernels.cpu.processor import has_bfloat16_pairs
from trunkline.kernels.cpu.threads import team_size

from .layout import Layout
from .quantized.cache import dequantize

SCORE_BYTES = 1 << 28  # of the scores that :func:`extend_reference` computes at a time
MIN_PARALLEL = 1 << 19  # multiply-adds of the scores; below, waking the other threads costs more than it saves


def extend_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keys: torch.Tensor | None,
    values: torch.Tensor | None,
    layout: Layout,
    row_ids: Sequence[int] | np.ndarray,
    out: torch.Tensor,
    *,
    scale: float,
    causal: bool = True,
    window: int = 0,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    chunk: int = 0,
) -> None:
    """Attention in plain torch, row by row; of its score matrix, at most ``SCORE_BYTES`` are in memory at a time.

    ``q`` [T, H, D], ``k`` [T, KV, D] and ``v`` [T, KV, Dv] hold the new tokens of all rows, of any
    float dtype. ``keys`` [slots, KV, D] and ``values`` [slots, KV, Dv] are one layer of the KV pool,
    which already contains the new tokens, or None where no row has a cached prefix. An int8 pool has rows of
    another width (:mod:`.quantized.cache`), and all keys and values are read from it. ``row_ids`` selects
    rows of ``layout``. Computes in float32, or in float64 for float64 inputs, and writes ``out`` [T, H, Dv]
    at the selected rows' tokens only. Non-causal rows have no cached prefix.

    ``scale``, ``window``, ``softcap``, ``sinks`` and ``chunk``: see :meth:`.Backend.attention`.
    """
    exact = torch.promote_types(q.dtype, torch.float32)
    for r in row_ids:
        first, end = int(layout.q_start[r]), int(layout.q_start[r + 1])
        row_k, row_v = (x.to(exact) for x in row_keys(k, v, keys, values, layout, r))
        mask = visible(end - first, len(row_k), causal, window, chunk, q.device)
        step = max(1, SCORE_BYTES // (len(row_k) * q.shape[1] * exact.itemsize))
        for start in range(first, end, step):
            tokens = slice(start, min(start + step, end))
            rows = mask[start - first : tokens.stop - first]
            found = attend(q[tokens].to(exact), row_k, row_v, rows, scale=scale, softcap=softcap, sinks=sinks)
            out[tokens] = found.to(out.dtype)


def extend_cpu(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keys: torch.Tensor | None,
    values: torch.Tensor | None,
    layout: Layout,
    row_ids: Sequence[int] | np.ndarray,
    out: torch.Tensor,
    *,
    scale: float,
    causal: bool = True,
    window: int = 0,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    chunk: int = 0,
) -> None:
    """:func:`extend_reference`, compiled, all rows in one call, on torch's threads: flash attention.

    All tensors are on the CPU and of one dtype, float32 or bfloat16, or the pool is int8; sums are float32.
    ``keys``, ``values`` and ``out`` are contiguous. ValueError for another dtype of ``q``; the rest isn't checked.

    Source: Dao, "FlashAttention-2" (2023, arXiv:2307.08691), for CPU caches: :mod:`.flash_arguments`.
    """
    if q.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"the cpu backend computes in float32 and bfloat16, not {q.dtype}")
    heads, key_dim = q.shape[1:]
    kv_heads, value_dim, int8 = k.shape[1], out.shape[2], keys is not None and keys.dtype == torch.int8
    q = _with_contiguous_heads(q)
    # With an int8 pool, all keys are read from it: results must not depend on which of them are new in the pass.
    new_k, new_v = (None if int8 else _with_contiguous_heads(x) for x in (k, v))
    row_ids = np.ascontiguousarray(row_ids, dtype=np.int32)
    query_counts = layout.q_start[row_ids + 1] - layout.q_start[row_ids]
    multiplications = int(np.dot(query_counts.astype(np.int64), layout.kv_len[row_ids])) * heads * key_dim
    team = team_size(multiplications > MIN_PARALLEL)
    pairs = not int8 and multiplies_pairs(q.dtype, key_dim, value_dim)
    blocks = block_sizes(heads // kv_heads, key_dim, value_dim, pairs)
    scratch = scratch_memory(team_size() * blocks.scratch_size)  # the whole team replays recorded launches
    sinks = None if sinks is None else keep_alive(sinks.detach().float().contiguous())
    flash.kernel(q.dtype, pairs, int8).run(
        team,
        **_strided("q", q),
        **_strided("k", new_k),
        **_strided("v", new_v),
        keys=0 if keys is None else keys.data_ptr(),
        values=0 if values is None else values.data_ptr(),
        out=out.data_ptr(),
        sinks=0 if sinks is None else sinks.data_ptr(),
        **layout_of(layout, row_ids),
        prompts=len(row_ids),
        claimed=0,
        heads=heads,
        kv_heads=kv_heads,
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


def multiplies_pairs(dtype: torch.dtype, key_dim: int, value_dim: int) -> bool:
    """Whether :func:`extend_cpu` multiplies pairs of bfloat16 numbers, for keys and values of these widths."""
    return dtype == torch.bfloat16 and flash_pairs.fits(key_dim, value_dim) and has_bfloat16_pairs()


def block_sizes(group_size: int, key_dim: int, value_dim: int, pairs: bool) -> Blocks:
    """The sizes of :func:`extend_cpu`'s blocks; ``pairs``: whether it multiplies pairs."""
    return sizes(group_size, key_dim, value_dim, flash_pairs.PANELS_PER_CALL if pairs else 1)


def _with_contiguous_heads(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(2) == 1 else x.contiguous()


def _strided(name: str, x: torch.Tensor | None) -> dict[str, int]:
    """Kernel arguments of a tensor [T, heads, width]: its address, and its strides over tokens and heads in bytes."""
    if x is None:
        return {name: 0, f"{name}_token": 0, f"{name}_head": 0}
    return {name: x.data_ptr(), f"{name}_token": x.stride(0) * x.itemsize, f"{name}_head": x.stride(1) * x.itemsize}


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor,
    *,
    scale: float,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """``softmax(scale * q kᵀ) v`` of one row: ``q`` [n, H, D], ``k`` [m, KV, D], ``v`` [m, KV, Dv] -> [n, H, Dv].

    All are of one float dtype, in which it computes. H is a multiple of KV: query head ``h`` reads
    KV head ``h // (H / KV)``. ``mask`` bool [n, m] is True where a query sees a key. ``sinks`` [H] are
    the scores of one more softmax column, which has no value (GPT-OSS).
    """
    n, heads, _ = q.shape
    kv_heads = k.shape[1]
    query = q.view(n, kv_heads, heads // kv_heads, -1).permute(1, 2, 0, 3)  # [KV, H/KV, n, D]
    scores = query @ k.permute(1, 2, 0)[:, None] * scale  # [KV, H/KV, n, m]
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        column = sinks.to(scores.dtype).view(kv_heads, -1, 1, 1).expand(*scores.shape[:3], 1)
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
    """All keys [kv_len, KV, D] and values [kv_len, KV, Dv] of row number ``row``.

    ``k``, ``v``, ``keys`` and ``values``: see :func:`extend_reference`. Returns views of ``k`` and ``v``
    when the row has no cached prefix and the pool isn't int8, else copies gathered from the pool.
    """
    start, stop, length = int(layout.q_start[row]), int(layout.q_start[row + 1]), int(layout.kv_len[row])
    if keys is None or values is None or (length == stop - start and keys.dtype != torch.int8):
        return k[start:stop], v[start:stop]
    slots = layout.on(keys.device).table[int(layout.table_row[row]), :length]
    return pooled(keys, values, slots, k.shape[2], v.shape[2])


def pooled(
    keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor, key_dim: int, value_dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The keys [n, KV, D] and values [n, KV, Dv] in ``slots``, int32 [n]; those of an int8 pool are float32."""
    k, v = keys.index_select(0, slots), values.index_select(0, slots)
    return (k, v) if keys.dtype != torch.int8 else (dequantize(k, key_dim), dequantize(v, value_dim))


def visible(n: int, m: int, causal: bool, window: int, chunk: int, device: torch.device) -> torch.Tensor:
    """The attention mask of the last ``n`` of ``m`` positions over all ``m`` keys: bool [n, m], True = visible.

    ``window`` and ``chunk``, in tokens, as in :meth:`.Backend.attention`; 0 for none.
    """
    position = torch.arange(m - n, m, device=device)[:, None]
    key = torch.arange(m, device=device)
    distance = position - key
    mask = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    if window:
        mask &= distance.abs() < window
    if chunk:
        mask &= position // chunk == key // chunk
    return mask
