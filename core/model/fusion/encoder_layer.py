"""The fused encoder layer, and the forward pass over all of them: what :mod:`.find_encoder` puts in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from trunkline.core.model.attention import ForwardContext
from trunkline.kernels.gelu import gelu
from trunkline.kernels.glu import activate
from trunkline.kernels.layer_norm import layer_norm

from .decoder_layer import AttentionCall, Matrices
from .origins import Origins

TOKENS = 1024  # whose intermediate numbers are made and used up while they are in the cache


@dataclass(frozen=True, slots=True)
class LayerNorm:
    """Layer norm with float32 ``weight`` and ``bias``."""

    weight: torch.Tensor
    bias: torch.Tensor
    eps: float

    def __call__(
        self, x: torch.Tensor, residual: torch.Tensor | None = None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        return layer_norm(x, self.weight, self.bias, self.eps, residual, out)


class FusedEncoderLayer(nn.Module):
    """Attention over whole sequences and an MLP without a gate, each with its residual normed afterwards."""

    def __init__(
        self, call: AttentionCall, matrices: Matrices, attention_norm: LayerNorm, mlp_norm: LayerNorm, activation: str
    ) -> None:
        """``matrices.gate_up`` has no gate here; it and ``down`` must be given."""
        super().__init__()
        assert matrices.gate_up is not None
        assert matrices.down is not None
        self.call, self.activation = call, activation
        self.qkv, self.out, self.up, self.down = matrices.qkv, matrices.out, matrices.gate_up, matrices.down
        self.attention_norm, self.mlp_norm = attention_norm, mlp_norm
        self.origins: Origins = {}

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *_: Any,
        trunk: ForwardContext | None = None,
        **__: Any,
    ) -> torch.Tensor:
        """As transformers calls a layer: ``[1, T, H]`` -> ``[1, T, H]``. ValueError for padded batches."""
        if trunk is None or attention_mask is not None or len(hidden_states) != 1:
            raise ValueError("fused layers run packed sequences: no mask, and a context that says where each begins")
        return self.step(hidden_states[0], trunk)[None]

    def step(self, x: torch.Tensor, trunk: ForwardContext) -> torch.Tensor:
        """``x`` [T, H] -> [T, H]."""
        attended = self._attend(x, trunk)
        result = torch.empty_like(x)
        for first in range(0, len(x), TOKENS):
            some = slice(first, first + TOKENS)
            y = self.attention_norm(self.out.forward(attended[some]), x[some])
            h = self.up.forward(y)
            h = gelu(h) if self.activation == "gelu" else activate(h, self.activation)
            self.mlp_norm(self.down.forward(h), y, result[some])
        return result

    def _attend(self, x: torch.Tensor, trunk: ForwardContext) -> torch.Tensor:
        call = self.call
        qkv = self.qkv.forward(x).view(len(x), call.heads + 2 * call.kv_heads, call.width)
        q, k, v = torch.split(qkv, [call.heads, call.kv_heads, call.kv_heads], 1)
        trunk.calls += 1
        trunk.seen[call.layer] = (call.kv_heads, call.width, call.width)
        out = trunk.backend.attention(
            q,
            k,
            v,
            None,
            None,
            trunk.layout,
            scale=call.scale,
            causal=call.causal,
            window=call.window,
            softcap=call.softcap,
            chunk=call.chunk,
        )
        return out.view(len(x), call.heads * call.width)


class FusedEmbeddings:
    """Vectors of ids, positions and token types, added and normed."""

    def __init__(self, words: torch.Tensor, places: torch.Tensor, types: torch.Tensor | None, norm: LayerNorm) -> None:
        """Tables ``[ids, H]``, ``[positions, H]`` and ``[types, H]``."""
        self.words, self.places, self.types, self.norm = words, places, types, norm
        # Most passes are all of type 0.
        self.first = places if types is None else (places.float() + types[0].float()).to(places.dtype)

    def __call__(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, token_type_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        """``[1, T]`` each -> ``[1, T, H]``."""
        words = F.embedding(input_ids[0], self.words)
        if token_type_ids is None or self.types is None:
            return self.norm(words, F.embedding(position_ids[0], self.first))[None]
        places = F.embedding(position_ids[0], self.places) + F.embedding(token_type_ids[0], self.types)
        return self.norm(words, places)[None]


class EncoderWalk:
    """Replaces ``forward`` of a base model that is embeddings, fused layers and at most a pooler.

    A pass that asks for more goes through the class's own forward.
    """

    def __init__(self, base: Any, layers: list[FusedEncoderLayer], output: type, embeddings: Any) -> None:
        """``output``: the class of what ``base`` returns; ``embeddings``: its own, or what does the same."""
        self.original, self.output = base.forward, output
        self.embeddings, self.pooler = embeddings, getattr(base, "pooler", None)
        self.layers = layers

    def __call__(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        trunk: ForwardContext | None = None,
        **others: Any,
    ) -> Any:
        """Ids, token types and positions ``[1, T]``; returns transformers' output object, hidden ``[1, T, H]``."""
        given = {"input_ids": input_ids, "position_ids": position_ids}
        if token_type_ids is not None:  # models without token types don't know the word
            given["token_type_ids"] = token_type_ids
        asked = (value is not None and value is not False for value in (attention_mask, *others.values()))
        packed = input_ids is not None and len(input_ids) == 1 and position_ids is not None and trunk is not None
        if not packed or any(asked):
            return self.original(attention_mask=attention_mask, trunk=trunk, **given, **others)
        assert trunk is not None
        x = self.embeddings(**given)[0]
        for layer in self.layers:
            x = layer.step(x, trunk)
        hidden = x[None]
        if self.pooler is None:
            return self.output(last_hidden_state=hidden)
        return self.output(last_hidden_state=hidden, pooler_output=self.pooler(hidden))
