"""Paged decode attention: rows with one query each, over keys and values that are scattered in the KV pool."""

from __future__ import annotations

import numpy as np
import torch

from trunkline.kernels.cpu.attention import ordered, ordered_pairs, paged
from trunkline.kernels.cpu.elements import layout_of
from trunkline.kernels.cpu.launches.memory import keep_alive, scratch_memory
from trunkline.kernels.cpu.threads import team_size

from . import attention_extend
from .layout import Layout

GATHERED_BYTES = 1 << 28  # of keys and values that :func:`decode_batched` copies at a time


def decode_reference(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    layout: Layout,
    row_ids: np.ndarray,
    out: torch.Tensor,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    chunk: int = 0,
) -> None:
    """Causal attention of one query per row, in plain torch: gathers each row's keys and values.

    ``q`` [T, H, D], ``keys`` [slots, KV, D] and ``values`` [slots, KV, Dv], of any float dtype. The
    last two are one layer of the KV pool, and already contain the new tokens; an int8 pool has rows of
    another width, see :mod:`.quantized.cache`. ``row_ids`` int32 [N] selects rows of ``layout`` with one
    query each. Computes in float32, or in float64 for float64 inputs, and writes ``out`` [T, H, Dv] at the
    selected rows' tokens only.

    ``scale``, ``window``, ``softcap``, ``sinks`` and ``chunk``: see :meth:`.Backend.attention`.
    """
    exact = torch.promote_types(q.dtype, torch.float32)
    for r in row_ids:
        tokens = slice(int(layout.q_start[r]), int(layout.q_start[r]) + 1)
        slots = layout.on(keys.device).table[int(layout.table_row[r]), : int(layout.kv_len[r])]
        k, v = (x.to(exact) for x in attention_extend.pooled(keys, values, slots, q.shape[2], out.shape[2]))
        mask = attention_extend.visible(1, len(k), True, window, chunk, q.device)
        row = attention_extend.attend(q[tokens].to(exact), k, v, mask, scale=scale, softcap=softcap, sinks=sinks)
        out[tokens] = row.to(out.dtype)


def decode_batched(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    layout: Layout,
    row_ids: np.ndarray,
    out: torch.Tensor,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    chunk: int = 0,
) -> None:
    """:func:`decode_reference` in plain torch on any device, for many rows at once.

    Rows are padded to the longest one, and divided so that the gathered keys and values take at most
    ``GATHERED_BYTES``. ``row_ids`` must be the first rows of the layout, which have one query each. Lengths and slots
    are read from the layout's tensors; ``layout.kv_len`` only bounds them, so that a CUDA graph of it can be replayed
    with other rows.
    """
    exact = torch.promote_types(q.dtype, torch.float32)
    tensors, longest = layout.on(q.device), int(layout.kv_len[: len(row_ids)].max())
    heads, kv_heads = q.shape[1], keys.shape[1]
    position = torch.arange(longest, device=q.device)
    row_bytes = longest * kv_heads * (keys.shape[2] + values.shape[2]) * exact.itemsize
    step = max(1, GATHERED_BYTES // row_bytes)
    for first in range(0, len(row_ids), step):
        rows = slice(first, min(first + step, len(row_ids)))
        length = tensors.kv_len[rows, None]
        seen = position < length
        if window:
            seen = seen & (position >= length - window)
        if chunk:
            seen = seen & (position // chunk == (length - 1) // chunk)
        # Entries of the table that aren't the row's, and slots that aren't seen, may hold any number, even NaN.
        slots = torch.where(seen, tensors.table[:, :longest][tensors.table_row[rows].long()], 0).long()
        k = keys[slots].to(exact).masked_fill(~seen[..., None, None], 0)  # [n, longest, KV, D]
        v = values[slots].to(exact).masked_fill(~seen[..., None, None], 0)
        query = q[rows].to(exact).reshape(len(slots), kv_heads, heads // kv_heads, -1)
        scores = query @ k.permute(0, 2, 3, 1) * scale  # [n, KV, H / KV, longest]
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~seen[:, None, None], -torch.inf)
        if sinks is not None:
            column = sinks.to(exact).view(kv_heads, -1, 1).expand(len(slots), -1, -1, 1)
            scores = torch.cat([scores, column], dim=-1)
        weights = scores.softmax(-1)[..., :longest]
        out[rows] = (weights @ v.transpose(1, 2)).reshape(len(slots), heads, -1).to(out.dtype)


def decode_cpu(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    layout: Layout,
    row_ids: np.ndarray,
    out: torch.Tensor,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    chunk: int = 0,
) -> None:
    """:func:`decode_reference`, compiled, on torch's threads: the split-KV scheme of Flash-Decoding.

    All tensors are on the CPU. ``q``, ``keys``, ``values`` and ``out`` are of one dtype, float32 or
    bfloat16, or the pool is int8; sums are float32. ``keys``, ``values`` and ``out`` are contiguous. Nothing
    of this is checked: :meth:`.Backend.attention` is the caller, and the loop reads and writes by address.

    Source: Dao et al., "Flash-Decoding for long-context inference" (2023).
    """
    heads, key_dim = q.shape[1:]
    kv_heads, value_dim = keys.shape[1], out.shape[2]
    if q.stride(2) != 1:
        q = q.contiguous()
    row_ids = np.ascontiguousarray(row_ids, dtype=np.int32)
    shares = team_size(len(row_ids) * heads * key_dim * int(layout.kv_len.max()) > attention_extend.MIN_PARALLEL)
    size = paged.scratch_bytes(heads, key_dim, value_dim)
    scratch = scratch_memory(shares * size)
    sinks = None if sinks is None else keep_alive(sinks.detach().float().contiguous())
    kernel = paged.kernel(key_dim, value_dim, q.dtype == torch.bfloat16, keys.dtype == torch.int8)
    arguments: dict[str, float] = {
        "q": q.data_ptr(),
        "q_token": q.stride(0),
        "q_head": q.stride(1),
        "keys": keys.data_ptr(),
        "values": values.data_ptr(),
        "out": out.data_ptr(),
        "scratch": scratch.data_ptr(),
        "sinks": 0 if sinks is None else sinks.data_ptr(),
        **layout_of(layout, row_ids),
        "decodes": len(row_ids),
        "heads": heads,
        "kv_heads": kv_heads,
        "window": window,
        "chunk": chunk,
        "scale": scale,
        "softcap": softcap,
    }
    kernel.run(shares, **arguments, shares=shares)
    if shares > 1:
        kernel.run(1, True, **arguments, shares=-shares)


def decode_ordered(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    layout: Layout,
    row_ids: np.ndarray,
    out: torch.Tensor,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    chunk: int = 0,
) -> None:
    """:func:`decode_cpu`, with the same requirements, for results that have the bits of :func:`.extend_cpu`.

    So a query's result depends neither on other rows, nor on whether it was computed with other queries of its row.
    """
    heads, key_dim = q.shape[1:]
    kv_heads, value_dim, int8 = keys.shape[1], out.shape[2], keys.dtype == torch.int8
    if q.stride(2) != 1:
        q = q.contiguous()
    row_ids = np.ascontiguousarray(row_ids, dtype=np.int32)
    team = team_size(len(row_ids) * heads * key_dim * int(layout.kv_len.max()) > attention_extend.MIN_PARALLEL)
    group_size, pairs = heads // kv_heads, not int8 and attention_extend.multiplies_pairs(q.dtype, key_dim, value_dim)
    block_keys = attention_extend.block_sizes(group_size, key_dim, value_dim, pairs).block_keys
    widths = group_size, key_dim, value_dim, block_keys
    if pairs:
        kernel, size = ordered_pairs.kernel(key_dim, value_dim), ordered_pairs.scratch_bytes(*widths)
    else:
        kernel = ordered.kernel(key_dim, value_dim, q.dtype == torch.bfloat16, int8)
        size = ordered.scratch_bytes(*widths)
    scratch = scratch_memory(team_size() * size)  # the whole team replays recorded launches
    sinks = None if sinks is None else keep_alive(sinks.detach().float().contiguous())
    kernel.run(
        team,
        q=q.data_ptr(),
        q_token=q.stride(0),
        q_head=q.stride(1),
        keys=keys.data_ptr(),
        values=values.data_ptr(),
        out=out.data_ptr(),
        scratch=scratch.data_ptr(),
        scratch_size=size,
        sinks=0 if sinks is None else sinks.data_ptr(),
        **layout_of(layout, row_ids),
        decodes=len(row_ids),
        claimed=0,
        heads=heads,
        kv_heads=kv_heads,
        window=window,
        chunk=chunk,
        block_keys=block_keys,
        scale=scale,
        softcap=softcap,
    )
