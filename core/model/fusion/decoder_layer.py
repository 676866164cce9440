"""The fused decoder layer; :mod:`.find_decoder` puts it into a model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from trunkline.core.model.attention import ForwardContext
from trunkline.kernels.glu import COMPILED
from trunkline.kernels.layout import KVSlots

from .origins import Origins
from .recorded import Scratch

if TYPE_CHECKING:
    from trunkline.kernels.linear import LinearLayer


@dataclass(frozen=True, slots=True)
class Norm:
    """RMS norm. ``weight`` is the float32 factor itself: for Gemma, it already is ``1 + w``.

    ``operation``: :attr:`.Backend.rms_norm`.
    """

    weight: torch.Tensor
    eps: float
    operation: Callable[..., torch.Tensor]

    def __call__(
        self, x: torch.Tensor, residual: torch.Tensor | None = None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        return self.operation(x, self.weight, self.eps, residual, out)


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """A layer's arguments of :meth:`.Backend.attention` that are the same in every pass."""

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
    """A layer's merged linear layers, made by :attr:`.Backend.linear`.

    ``gate_up`` and ``down`` are None if the layer keeps its own MLP module.
    """

    qkv: LinearLayer
    out: LinearLayer
    gate_up: LinearLayer | None
    down: LinearLayer | None

    def with_biases(self, biases: Biases) -> Matrices:
        """The same weights, not copied, with other biases."""

        def rebias(linear: LinearLayer | None, bias: torch.Tensor | None) -> Any:
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
    """The biases of the merged linear layers, None for none."""

    qkv: torch.Tensor | None = None
    out: torch.Tensor | None = None
    gate_up: torch.Tensor | None = None
    down: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Norms:
    """A layer's norms: before attention and MLP; after each of them (Gemma); of queries and keys."""

    attention: Norm
    mlp: Norm
    after_attention: Norm | None = None
    after_mlp: Norm | None = None
    queries: Norm | None = None
    keys: Norm | None = None


class FusedLayer(nn.Module):
    """A pre-norm decoder layer with rotary attention and a gated MLP, in about eight kernel calls.

    With ``mlp`` (a mixture of experts), that module is kept, and only attention is fused.
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
        """The interface of transformers' layers: ``[1, T, H]`` -> ``[1, T, H]``; cos and sin ``[1, T, R]``."""
        cos, sin = position_embeddings
        return self.compute(hidden_states[0], cos[0], sin[0], trunk)[None]

    def compute(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        trunk: ForwardContext,
        wanted: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``x`` [T, H], ``cos`` and ``sin`` [T, R] -> [T, H], or [W, H] with only the rows ``wanted`` (int64 [W])."""
        attended = self._rotate_and_attend(self.qkv.forward(self.norms.attention(x)), cos, sin, trunk)
        if wanted is not None:
            attended, x = attended[wanted], x[wanted]
        return self.complete(x, attended, trunk)

    def complete(self, x: torch.Tensor, attended: torch.Tensor, trunk: ForwardContext) -> torch.Tensor:
        """What follows attention in :meth:`compute`: ``x`` [T, H] and ``attended`` [T, A] -> [T, H]."""
        if self.norms.after_attention is None:
            x = self.out.forward(attended, x)
        else:
            x = self.norms.after_attention(self.out.forward(attended), x)
        h = self.norms.mlp(x)
        if self.gate_up is None or self.down is None:
            assert self.mlp is not None
            h = self.mlp(h[None])[0]
            return h + x if self.norms.after_mlp is None else self.norms.after_mlp(h, x)
        h = trunk.backend.glu(self.gate_up.forward(h), self.activation)
        if self.norms.after_mlp is None:
            return self.down.forward(h, x)
        return self.norms.after_mlp(self.down.forward(h), x)

    def _rotate_and_attend(
        self,
        qkv: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        trunk: ForwardContext,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """:meth:`attend` with rotary embedding, which changes ``qkv``.

        Of a causal layer, keys and values are written to the pool with their rotary embedding; the attention of others
        reads keys from ``qkv``.
        """
        kv_slots = None
        if trunk.pool is not None and self.call.causal:
            keys, values = (per_layer[self.call.layer] for per_layer in (trunk.pool.keys, trunk.pool.values))
            if keys is not None and values is not None:
                kv_slots = KVSlots(keys, values, trunk.layout.out_slots)
        self._rotate(qkv, cos, sin, trunk, kv_slots)
        return self.attend(qkv, trunk, out, written=kv_slots is not None)

    def _rotate(
        self, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, trunk: ForwardContext, slots: KVSlots | None
    ) -> None:
        """Rotary embedding and norms of the queries and keys in ``qkv``, in place."""
        call, norms = self.call, self.norms
        weights: tuple[Any, ...] = (None, None, 0.0)
        if norms.queries is not None and norms.keys is not None:
            weights = norms.queries.weight, norms.keys.weight, norms.queries.eps
        heads = qkv.view(len(qkv), call.heads + 2 * call.kv_heads, call.width)
        trunk.backend.rope(heads, cos, sin, call.heads, call.kv_heads, *weights, slots)

    def attend(
        self, qkv: torch.Tensor, trunk: ForwardContext, out: torch.Tensor | None = None, written: bool = False
    ) -> torch.Tensor:
        """Attention of the merged ``qkv`` [T, (H + 2 KV) D] with rotary embedding -> [T, H D], written to ``out`` if
        given. ``written``: keys and values are in the pool already.
        """
        call, pool = self.call, trunk.pool
        trunk.calls += 1
        trunk.kv_shapes[call.layer] = self.kv_shape
        keys, values = (None, None) if pool is None else (pool.keys[call.layer], pool.values[call.layer])
        heads = qkv.view(len(qkv), call.heads + 2 * call.kv_heads, call.width)
        q, k, v = heads.split_with_sizes([call.heads, call.kv_heads, call.kv_heads], 1)
        attended = trunk.backend.attention(
            q, k, v, keys, values, trunk.layout, scale=call.scale, causal=call.causal, window=call.window,
            softcap=call.softcap, chunk=call.chunk, written=written,
            out=None if out is None else out.view(q.shape),
        )  # fmt: skip
        return attended.view(len(qkv), call.heads * call.width)

    @property
    def kv_shape(self) -> tuple[int, int, int]:
        """The layer's number of KV heads, width of a key, width of a value."""
        return self.call.kv_heads, self.call.width, self.call.width

    @property
    def recordable(self) -> bool:
        """Whether the layer can be recorded: it is causal and runs only kernels that can be."""
        linears = self.qkv, self.out, self.gate_up, self.down
        # The GEMM epilogue adds a bias or a residual, not both.
        biased = any(
            after is None and linear is not None and linear.bias is not None
            for after, linear in ((self.norms.after_attention, self.out), (self.norms.after_mlp, self.down))
        )
        return (
            self.call.causal
            and (self.mlp is not None or self.activation in COMPILED)
            and not biased
            and all(linear.recordable for linear in linears if linear is not None)
        )

    def record_attention(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, trunk: ForwardContext, scratch: Scratch
    ) -> torch.Tensor:
        """The attention of :meth:`compute`, of a :attr:`recordable` layer; results are in ``scratch``."""
        normed = self.norms.attention(x, out=scratch("normed", x.shape[1]))
        qkv = self.qkv.forward_into(normed, scratch("qkv", self.qkv.out_features))
        return self._rotate_and_attend(qkv, cos, sin, trunk, scratch("attended", self.out.in_features))

    def record_qkv(
        self,
        x: torch.Tensor,
        rotary: Sequence[torch.Tensor],
        trunk: ForwardContext,
        scratch: Scratch,
        out: torch.Tensor,
    ) -> None:
        """The input of :meth:`attend`, of a :attr:`recordable` layer, into ``out``. ``rotary``: cos and sin [T, R]."""
        self.qkv.forward_into(self.norms.attention(x, out=scratch("normed", x.shape[1])), out)
        cos, sin = rotary
        self._rotate(out, cos, sin, trunk, None)

    def record_rest(self, x: torch.Tensor, attended: torch.Tensor, trunk: ForwardContext, scratch: Scratch) -> None:
        """:meth:`complete` of a :attr:`recordable` layer, in place on ``x``; other results are in ``scratch``.

        Without the MLP, if that is a module which is kept; its input is then in ``scratch`` as "normed".
        """
        norms, width = self.norms, x.shape[1]
        if norms.after_attention is None:
            self.out.forward_into(attended, x, x)
        else:
            norms.after_attention(self.out.forward_into(attended, scratch("added", width)), x, x)
        normed = norms.mlp(x, out=scratch("normed", width))
        if self.gate_up is None or self.down is None:
            return
        gate_up = self.gate_up.forward_into(normed, scratch("gate_up", self.gate_up.out_features))
        gated = trunk.backend.glu(gate_up, self.activation, scratch("gated", self.down.in_features))
        if norms.after_mlp is None:
            self.down.forward_into(gated, x, x)
        else:
            norms.after_mlp(self.down.forward_into(gated, scratch("added", width)), x, x)

    def add_kept_mlp(self, x: torch.Tensor, normed: torch.Tensor) -> None:
        """What :meth:`record_rest` leaves out, in place on ``x`` [T, H]."""
        assert self.mlp is not None
        h = self.mlp(normed[None])[0]
        if self.norms.after_mlp is None:
            x += h
        else:
            self.norms.after_mlp(h, x, x)
