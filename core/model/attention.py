"""Our attention function, registered in transformers' ``AttentionInterface``.

Every architecture that transformers routes through that interface runs on
:class:`trunkline.kernels.backend.Backend`: tokens of a batch packed as ``[1, T]``, no cache
object, and what the batch looks like in a :class:`ForwardContext` that the model's ``forward``
passes through as the keyword ``trunk``.
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

NAME = "trunkline"  # transformers gives a meaning to names with sdpa, flash, flex, "/" or "|" in them
EAGER = "eager"  # transformers' plain one: what ours is compared with, and what padded batches run on


@dataclass(slots=True)
class ForwardContext:
    """What attention needs to know of one forward pass.

    ``pool`` is None where nothing is kept: encoders and warm-up. ``seen`` collects, per layer
    index, what the layer handed over; ``calls`` counts. Neither notes a pass that is played back.
    ``wanted`` (int64 token indices) are the only rows whose hidden state anybody looks at. A backbone
    that computes just these in its last layer says so by the attribute ``picked`` of its output.
    """

    layout: Layout
    pool: KVPool | None
    backend: Backend
    wanted: torch.Tensor | None = None
    calls: int = 0
    seen: dict[int, KVShape] = field(default_factory=dict)


def register() -> None:
    """Make ``attn_implementation=NAME`` known to transformers. Harmless when done twice.

    No mask function goes with it: models then build no mask at all, which is right for packed
    rows and would be wrong for padded ones.
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

    ``query`` is ``[1, H, T, D]``, ``key`` ``[1, KV, T, D]``, ``value`` ``[1, KV, T, Dv]``, after
    rotary embedding. Returns ``[1, T, H, Dv]``. ``is_causal`` as a keyword (decoders made
    bidirectional by their config) wins over the module's own.
    """
    if trunk is None:
        raise UnsuitedAttention("the model's layers don't pass keyword arguments on to attention")
    if attention_mask is not None:
        raise UnsuitedAttention("the model hands a mask of its own to attention")
    tokens = int(trunk.layout.q_start[-1])
    # Kernels read and write as many rows as the layout says, wherever tensors end.
    if query.shape[0] != 1 or not query.shape[2] == key.shape[2] == value.shape[2] == tokens:
        raise UnsuitedAttention(f"a layer computes {query.shape[2]} queries and {key.shape[2]} keys of {tokens} tokens")
    layer: int = module.layer_idx  # type: ignore[assignment]
    pool = trunk.pool
    trunk.calls += 1
    trunk.seen[layer] = (key.shape[1], key.shape[3], value.shape[3])
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
    """Length of attention chunks, 0 for none. Llama 4 passes it to nobody: it stands in the config."""
    config: Any = getattr(module, "config", None)
    kinds = getattr(config, "layer_types", None)
    if not kinds or kinds[module.layer_idx] != "chunked_attention":
        return 0
    return int(config.attention_chunk_size)


def packed_layout(lengths: Sequence[int]) -> Layout:
    """Whole sequences one after another, nothing cached and nothing kept."""
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
    """Row ``r`` computes positions ``spans[r] = (start, end)`` over ``[0, start)`` in the pool.

    ``table`` is int32 ``[rows, max_len]``: the slot of each row's position. Rows of one token
    over a cached prefix come first.
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
