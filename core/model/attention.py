"""Our attention function, registered in transformers' ``AttentionInterface``.

Every architecture that transformers routes through that interface runs on
:class:`trunkline.kernels.backend.Backend`. The tokens of a batch are packed as ``[1, T]``, and there is no
cache object. A :class:`ForwardContext` describes the batch; the model's ``forward`` passes it on to
attention as the keyword argument ``trunk``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from trunkline.kernels.layout import Layout

from .refusal import UnsuitedAttention

if TYPE_CHECKING:
    from trunkline.core.cache.pool import KVPool, KVShape
    from trunkline.kernels.backend import Backend

NAME = "trunkline"  # names with sdpa, flash, flex, "/" or "|" in them have a special meaning in transformers
EAGER = "eager"  # transformers' implementation in plain torch: our reference, and used for padded batches


@dataclass(slots=True)
class ForwardContext:
    """What attention needs to know about one forward pass.

    ``pool`` is None where no keys and values are kept: encoders and warm-up. ``wanted`` (int64 token
    indices) are the only hidden rows that are needed. A backbone that computes only these in its last
    layer sets the attribute ``picked`` of its output. For verification, ``calls`` counts calls of
    attention, and ``kv_shapes`` collects each layer's key and value shape; a replayed pass sets neither.
    """

    layout: Layout
    pool: KVPool | None
    backend: Backend
    wanted: torch.Tensor | None = None
    calls: int = 0
    kv_shapes: dict[int, KVShape] = field(default_factory=dict)


def register() -> None:
    """Make ``attn_implementation=NAME`` known to transformers. May be called more than once.

    We register no mask function for it. So models build no mask, which is right for packed rows and would
    be wrong for padded ones.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attend)


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    trunk: ForwardContext | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    is_causal: bool | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one layer over packed rows; called by transformers' attention modules.

    ``query`` is ``[1, H, T, D]``, ``key`` ``[1, KV, T, D]``, ``value`` ``[1, KV, T, Dv]``, after rotary
    embedding. Returns ``[1, T, H, Dv]``. ``s_aux`` are attention sinks ``[H]``. The keyword ``is_causal``,
    which decoders pass that their config makes bidirectional, overrides the module's attribute.
    UnsuitedAttention for calls that our kernels can't compute.
    """
    if trunk is None:
        raise UnsuitedAttention("the model's layers don't pass keyword arguments on to attention")
    if attention_mask is not None:
        raise UnsuitedAttention("the model hands a mask of its own to attention")
    tokens = int(trunk.layout.q_start[-1])
    # Kernels read and write as many rows as the layout says, without checking the tensors' sizes.
    if query.shape[0] != 1 or not query.shape[2] == key.shape[2] == value.shape[2] == tokens:
        raise UnsuitedAttention(f"a layer computes {query.shape[2]} queries and {key.shape[2]} keys of {tokens} tokens")
    layer: int = module.layer_idx  # type: ignore[assignment]
    pool = trunk.pool
    trunk.calls += 1
    trunk.kv_shapes[layer] = (key.shape[1], key.shape[3], value.shape[3])
    out = trunk.backend.attention(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        None if pool is None else pool.keys[layer],
        None if pool is None else pool.values[layer],
        trunk.layout,
        scale=query.shape[3] ** -0.5 if scaling is None else scaling,
        causal=bool(module.is_causal if is_causal is None else is_causal),
        window=sliding_window or 0,
        softcap=softcap or 0.0,
        sinks=s_aux,
        chunk=chunk_size(module),
    )
    return out[None], None


def chunk_size(module: Any) -> int:
    """Length of attention chunks in tokens, 0 for none. Llama 4 doesn't pass it to attention; it is in the config."""
    config: Any = getattr(module, "config", None)
    kinds = getattr(config, "layer_types", None)
    if not kinds or kinds[module.layer_idx] != "chunked_attention":
        return 0
    return int(config.attention_chunk_size)


def packed_layout(lengths: Sequence[int]) -> Layout:
    """The layout of whole sequences of these lengths (tokens), without a cached prefix and without a pool."""
    q_start = np.zeros(len(lengths) + 1, np.int32)
    np.cumsum(lengths, out=q_start[1:])
    return Layout(
        q_start=q_start,
        kv_len=np.asarray(lengths, np.int32),
        table_row=np.zeros(len(lengths), np.int32),
        table=np.zeros((1, 1), np.int32),
        out_slots=torch.zeros(0, dtype=torch.int64),
        decodes=0,
    )


def paged_layout(table: np.ndarray, spans: Sequence[tuple[int, int]], device: torch.device | str = "cpu") -> Layout:
    """The layout of rows that compute positions ``spans[r] = (start, end)``; ``[0, start)`` are in the pool.

    ``table`` is the slot table, int32 ``[rows, max_len]``. Leading rows with one token over a cached prefix
    count as decoding.
    """
    lengths = [end - start for start, end in spans]
    layout = packed_layout(lengths)
    layout.kv_len = np.asarray([end for _, end in spans], np.int32)
    layout.table_row = np.arange(len(spans), dtype=np.int32)
    layout.table = table
    slots = np.concatenate([table[row, start:end] for row, (start, end) in enumerate(spans)])
    layout.out_slots = torch.from_numpy(slots.astype(np.int64)).to(device)
    for start, end in spans:
        if start == 0 or end - start != 1:
            break
        layout.decodes += 1
    return layout
