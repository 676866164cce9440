"""The fused decoder layer, and the forward pass over all of them: what :mod:`.find_decoder` puts in."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from trunkline.core.model.attention import ForwardContext
from trunkline.kernels.glu import COMPILED, glu
from trunkline.kernels.linear import PackedLinear
from trunkline.kernels.norm import rms_norm
from trunkline.kernels.rope import rope

from .origins import Origins
from .recorded import Decoding, Scratch


@dataclass(frozen=True, slots=True)
class Norm:
    """RMS norm: float32 ``weight`` as it is multiplied (Gemma's ``1 + w`` added up already)."""

    weight: torch.Tensor
    eps: float

    def __call__(
        self, x: torch.Tensor, residual: torch.Tensor | None = None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps, residual, out)


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """What a layer hands to :meth:`Backend.attention` beside tensors; the same in every pass."""

    layer: int
    heads: int
    kv_heads: int
    width: int
    scale: float
    causal: bool
    window: int
    softcap: float
    chunk: int


@dataclass(frozen=True, slots=True)
class Matrices:
    """A layer's packed linear maps; None where the layer keeps its own MLP module."""

    qkv: PackedLinear
    out: PackedLinear
    gate_up: PackedLinear | None
    down: PackedLinear | None

    def with_biases(self, biases: Biases) -> Matrices:
        """The same packed weights, not copied, with other biases."""

        def rebias(linear: PackedLinear | None, bias: torch.Tensor | None) -> Any:
            if linear is None:
                return None
            twin = copy.copy(linear)
            twin.set_bias(bias)
            return twin

        return Matrices(
            rebias(self.qkv, biases.qkv),
            rebias(self.out, biases.out),
            rebias(self.gate_up, biases.gate_up),
            rebias(self.down, biases.down),
        )


@dataclass(frozen=True, slots=True)
class Biases:
    """Biases of merged maps, None for none."""

    qkv: torch.Tensor | None = None
    out: torch.Tensor | None = None
    gate_up: torch.Tensor | None = None
    down: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Norms:
    """A layer's norms: before attention and MLP; after each (Gemma); of queries and keys."""

    attention: Norm
    mlp: Norm
    after_attention: Norm | None = None
    after_mlp: Norm | None = None
    queries: Norm | None = None
    keys: Norm | None = None


class FusedLayer(nn.Module):
    """A pre-norm decoder layer with rotary attention and a gated MLP, in as few calls as it takes.

    With ``mlp`` given (a mixture of experts), that module stays and only attention is fused.
    """

    def __init__(
        self, call: AttentionCall, matrices: Matrices, norms: Norms, activation: str, mlp: nn.Module | None
    ) -> None:
        super().__init__()
        self.call, self.norms, self.activation = call, norms, activation
        self.qkv, self.out, self.gate_up, self.down = matrices.qkv, matrices.out, matrices.gate_up, matrices.down
        self.mlp = mlp
        self.origins: Origins = {}

    def forward(
        self,
        hidden_states: torch.Tensor,
        *,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        trunk: ForwardContext,
        **_: Any,
    ) -> torch.Tensor:
        """As transformers calls a layer: ``[1, T, H]`` -> ``[1, T, H]``; cos and sin ``[1, T, R]``."""
        cos, sin = position_embeddings
        return self.step(hidden_states[0], cos[0], sin[0], trunk)[None]

    def step(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        trunk: ForwardContext,
        wanted: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``x`` [T, H], ``cos`` and ``sin`` [T, R] -> [T, H], or of the rows ``wanted`` only."""
        attended = self._attend(self.qkv.forward(self.norms.attention(x)), cos, sin, trunk)
        if wanted is not None:
            attended, x = attended[wanted], x[wanted]
        if self.norms.after_attention is None:
            x = self.out.forward(attended, x)
        else:
            x = self.norms.after_attention(self.out.forward(attended), x)
        h = self.norms.mlp(x)
        if self.gate_up is None or self.down is None:
            assert self.mlp is not None
            h = self.mlp(h[None])[0]
            return h + x if self.norms.after_mlp is None else self.norms.after_mlp(h, x)
        h = glu(self.gate_up.forward(h), self.activation)
        if self.norms.after_mlp is None:
            return self.down.forward(h, x)
        return self.norms.after_mlp(self.down.forward(h), x)

    def _attend(
        self,
        qkv: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        trunk: ForwardContext,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Merged ``qkv`` [T, (H + 2 KV) D], turned in place -> [T, H D]."""
        call, norms, pool = self.call, self.norms, trunk.pool
        heads = qkv.view(len(qkv), call.heads + 2 * call.kv_heads, call.width)
        if norms.queries is None or norms.keys is None:
            rope(heads, cos, sin, call.heads, call.kv_heads)
        else:
            queries, keys = norms.queries, norms.keys
            rope(heads, cos, sin, call.heads, call.kv_heads, queries.weight, keys.weight, queries.eps)
        q, k, v = torch.split(heads, [call.heads, call.kv_heads, call.kv_heads], 1)
        trunk.calls += 1
        trunk.seen[call.layer] = self.kv_shape
        attended = trunk.backend.attention(
            q,
            k,
            v,
            None if pool is None else pool.keys[call.layer],
            None if pool is None else pool.values[call.layer],
            trunk.layout,
            scale=call.scale,
            causal=call.causal,
            window=call.window,
            softcap=call.softcap,
            chunk=call.chunk,
            out=None if out is None else out.view(len(qkv), call.heads, call.width),
        )
        return attended.view(len(qkv), call.heads * call.width)

    @property
    def kv_shape(self) -> tuple[int, int, int]:
        """Heads of keys and values, width of a key, width of a value."""
        return self.call.kv_heads, self.call.width, self.call.width

    @property
    def plain(self) -> bool:
        """Can :meth:`record` do it: is it causal and made of launches of our own kernels alone?"""
        linears = self.qkv, self.out, self.gate_up, self.down
        # A bias where a residual is added takes one more operation.
        biased = any(
            after is None and linear is not None and linear.bias is not None
            for after, linear in ((self.norms.after_attention, self.out), (self.norms.after_mlp, self.down))
        )
        return (
            self.call.causal
            and self.mlp is None
            and self.activation in COMPILED
            and not biased
            and all(linear is not None and linear.plain for linear in linears)
        )

    def record(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, trunk: ForwardContext, scratch: Scratch
    ) -> None:
        """:meth:`step` of a :attr:`plain` layer, in place on ``x``, in memory that ``scratch`` owns."""
        assert self.gate_up is not None
        assert self.down is not None
        norms, width = self.norms, x.shape[1]
        normed = norms.attention(x, out=scratch("normed", width))
        qkv = self.qkv.into(normed, scratch("qkv", self.qkv.out_features))
        attended = self._attend(qkv, cos, sin, trunk, scratch("attended", self.out.in_features))
        if norms.after_attention is None:
            self.out.into(attended, x, x)
        else:
            norms.after_attention(self.out.into(attended, scratch("added", width)), x, x)
        normed = norms.mlp(x, out=scratch("normed", width))
        gate_up = self.gate_up.into(normed, scratch("gate_up", self.gate_up.out_features))
        gated = glu(gate_up, self.activation, scratch("gated", self.down.in_features))
        if norms.after_mlp is None:
            self.down.into(gated, x, x)
        else:
            norms.after_mlp(self.down.into(gated, scratch("added", width)), x, x)


class Walk:
    """Replaces ``forward`` of a base model whose layers are all fused and share one rotary embedding.

    A pass that asks for more than the last hidden state goes through the class's own forward.
    """

    def __init__(self, base: Any, layers: list[FusedLayer], norm: Norm, output: type) -> None:
        """``output``: the class of what ``base`` returns."""
        self.original, self.output = base.forward, output
        self.embed, self.rotary = base.embed_tokens, base.rotary_emb
        self.layers, self.norm = layers, norm
        self.playback = False  # may passes of lone tokens be recorded? see :func:`plays_back`
        self._decoding: Decoding | None = None

    def __call__(
        self,
        input_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        trunk: ForwardContext | None = None,
        **others: Any,
    ) -> Any:
        """Ids and positions ``[1, T]``; returns transformers' output object, hidden ``[1, T, H]``."""
        if input_ids is None or position_ids is None or trunk is None or any(map(_asks, others.values())):
            return self.original(input_ids=input_ids, position_ids=position_ids, trunk=trunk, **others)
        x = self.embed(input_ids)
        cos, sin = self.rotary(x, position_ids)
        x, picked = self._layers(x[0], cos[0].contiguous(), sin[0].contiguous(), trunk)
        result = self.output(last_hidden_state=self.norm(x)[None])
        result.picked = picked
        return result

    def _layers(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, trunk: ForwardContext
    ) -> tuple[torch.Tensor, bool]:
        """Hidden rows, and whether they are those of ``trunk.wanted`` only."""
        if self.playback and trunk.pool is not None and trunk.layout.decodes == trunk.layout.rows:
            if self._decoding is None or not self._decoding.covers(trunk):
                self._decoding = Decoding(self.layers, trunk, x, cos)
            return self._decoding.run(x, cos, sin, trunk), False
        for layer in self.layers[:-1]:
            x = layer.step(x, cos, sin, trunk)
        last = self.layers[-1]
        if last.mlp is not None:  # experts are shown every token: who counts them counts all
            return last.step(x, cos, sin, trunk), False
        return last.step(x, cos, sin, trunk, trunk.wanted), trunk.wanted is not None


def _asks(value: Any) -> bool:
    return value is not None and value is not False
