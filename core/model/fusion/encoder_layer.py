"""The fused encoder layer, and the forward pass over fused layers; :mod:`.find_encoder` puts them into a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from trunkline.core.model.attention import ForwardContext

from .decoder_layer import AttentionCall, Matrices
from .origins import Origins
from .recorded import Scratch
from .row_parallel import RowParallelLayers, row_parallel

if TYPE_CHECKING:
    from trunkline.kernels.backend import Backend

BLOCK_TOKENS = 1024  # tokens that pass through the MLP together, so that intermediate results stay in a CPU's cache


@dataclass(frozen=True, slots=True)
class LayerNorm:
    """Layer norm with float32 ``weight`` and ``bias``. ``operation``: :attr:`.Backend.layer_norm`."""

    weight: torch.Tensor
    bias: torch.Tensor
    eps: float
    operation: Callable[..., torch.Tensor]

    def __call__(
        self, x: torch.Tensor, residual: torch.Tensor | None = None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        return self.operation(x, self.weight, self.bias, self.eps, residual, out)


class FusedEncoderLayer(nn.Module):
    """A post-norm encoder layer: attention over whole sequences, and an MLP without a gate."""

    def __init__(
        self, call: AttentionCall, matrices: Matrices, attention_norm: LayerNorm, mlp_norm: LayerNorm, activation: str
    ) -> None:
        """``matrices.gate_up`` is the MLP's first linear layer, without a gate; it and ``down`` must not be None."""
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
        """The interface of transformers' layers: ``[1, T, H]`` -> ``[1, T, H]``. ValueError for padded batches."""
        if trunk is None or attention_mask is not None or len(hidden_states) != 1:
            raise ValueError("fused layers run packed sequences: they need a ForwardContext, and take no mask")
        return self.compute(hidden_states[0], trunk)[None]

    def compute(self, x: torch.Tensor, trunk: ForwardContext, wanted: torch.Tensor | None = None) -> torch.Tensor:
        """``x`` [T, H] -> [T, H], or [W, H] with only the rows ``wanted`` (int64 [W])."""
        attended = self.attend(self.qkv.forward(x), trunk)
        if wanted is not None:
            attended, x = attended[wanted], x[wanted]
        return self.complete(x, attended, trunk)

    def complete(self, x: torch.Tensor, attended: torch.Tensor, trunk: ForwardContext) -> torch.Tensor:
        """What follows attention in :meth:`compute`: ``x`` [T, H] and ``attended`` [T, A] -> [T, H]."""
        result = torch.empty_like(x)
        for first in range(0, len(x), BLOCK_TOKENS):
            block = slice(first, first + BLOCK_TOKENS)
            y = self.attention_norm(self.out.forward(attended[block]), x[block])
            h = trunk.backend.activate(self.up.forward(y), self.activation)
            self.mlp_norm(self.down.forward(h), y, result[block])
        return result

    def attend(self, qkv: torch.Tensor, trunk: ForwardContext, out: torch.Tensor | None = None) -> torch.Tensor:
        """Attention of the merged ``qkv`` [T, (H + 2 KV) D] -> [T, H D], written to ``out`` if given."""
        call = self.call
        heads = qkv.view(len(qkv), call.heads + 2 * call.kv_heads, call.width)
        q, k, v = heads.split_with_sizes([call.heads, call.kv_heads, call.kv_heads], 1)
        trunk.calls += 1
        trunk.kv_shapes[call.layer] = (call.kv_heads, call.width, call.width)
        attended = trunk.backend.attention(
            q, k, v, None, None, trunk.layout, scale=call.scale, causal=call.causal, window=call.window,
            softcap=call.softcap, chunk=call.chunk, out=None if out is None else out.view(q.shape),
        )  # fmt: skip
        return attended.view(len(qkv), call.heads * call.width)

    @property
    def recordable(self) -> bool:
        """Whether everything but attention runs only kernels that can be recorded."""
        return all(linear.recordable for linear in (self.qkv, self.out, self.up, self.down))

    def record_qkv(
        self,
        x: torch.Tensor,
        rotary: Sequence[torch.Tensor],
        trunk: ForwardContext,
        scratch: Scratch,
        out: torch.Tensor,
    ) -> None:
        """The input of :meth:`attend`, of a :attr:`recordable` layer, into ``out``. ``rotary`` is empty."""
        self.qkv.forward_into(x, out)

    def record_rest(self, x: torch.Tensor, attended: torch.Tensor, trunk: ForwardContext, scratch: Scratch) -> None:
        """:meth:`complete` of a :attr:`recordable` layer, in place on ``x``; other results are in ``scratch``."""
        added = scratch("added", x.shape[1])
        self.attention_norm(self.out.forward_into(attended, added), x, x)
        h = self.up.forward_into(x, scratch("up", self.up.out_features))
        activated = trunk.backend.activate(h, self.activation, scratch("activated", self.down.in_features))
        self.mlp_norm(self.down.forward_into(activated, added), x, x)


class FusedEmbeddings:
    """The embedding layer of an encoder: the sum of id, position and token type embeddings, layer-normalised."""

    def __init__(
        self, words: torch.Tensor, positions: torch.Tensor, types: torch.Tensor | None, norm: LayerNorm
    ) -> None:
        """Embedding tables: ``words`` [ids, H], ``positions`` [positions, H], ``types`` [types, H]."""
        self.words, self.positions, self.types, self.norm = words, positions, types, norm
        # Most passes have only tokens of type 0, whose vector is added to the positions' in advance.
        self.first = positions if types is None else (positions.float() + types[0].float()).to(positions.dtype)

    def __call__(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, token_type_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        """``[1, T]`` each -> ``[1, T, H]``."""
        words = F.embedding(input_ids[0], self.words)
        if token_type_ids is None or self.types is None:
            return self.norm(words, F.embedding(position_ids[0], self.first))[None]
        positions = F.embedding(position_ids[0], self.positions) + F.embedding(token_type_ids[0], self.types)
        return self.norm(words, positions)[None]


class FusedEncoderForward:
    """Replaces ``forward`` of a base model that consists of embeddings, fused layers and at most a pooler.

    Calls that request more run the class's own ``forward``.
    """

    def __init__(
        self,
        base: Any,
        layers: list[FusedEncoderLayer],
        output: type,
        embeddings: Any,
        backend: Backend,
        like: torch.Tensor,
    ) -> None:
        """``output``: the class of what ``base`` returns; ``embeddings``: its own, or equivalent ones; ``like``: hidden
        rows, of any number.
        """
        self.original, self.output = backend.row_invariant(base.forward), output
        self.embeddings, self.pooler = backend.row_invariant(embeddings), getattr(base, "pooler", None)
        self.layers, self.backend, self.like = layers, backend, [like]
        self.row_parallel: RowParallelLayers | None = None  # computes long passes

    def __call__(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        trunk: ForwardContext | None = None,
        **others: Any,
    ) -> Any:
        """Ids, token types and positions ``[1, T]``; returns transformers' output object, hidden ``[1, T, H]``.

        With ``trunk.wanted``, hidden rows are only those, and there is no ``pooler_output``.
        """
        given = {"input_ids": input_ids, "position_ids": position_ids}
        if token_type_ids is not None:  # models without token types don't accept the argument
            given["token_type_ids"] = token_type_ids
        asked = (value is not None and value is not False for value in (attention_mask, *others.values()))
        packed = input_ids is not None and len(input_ids) == 1 and position_ids is not None and trunk is not None
        if not packed or any(asked):
            return self.original(attention_mask=attention_mask, trunk=trunk, **given, **others)
        assert trunk is not None
        hidden = self._layers(self.embeddings(**given)[0], trunk)[None]
        if self.pooler is None or trunk.wanted is not None:
            result = self.output(last_hidden_state=hidden)
        else:
            result = self.output(last_hidden_state=hidden, pooler_output=self.pooler(hidden))
        result.picked = trunk.wanted is not None
        return result

    def forget(self) -> None:
        """Run launches one by one until :meth:`verify` is called: linear layers will be replaced."""
        self.row_parallel = None

    def verify(self, _: float) -> None:
        """Run several launches at once if results have the same bits; see :func:`.row_parallel`."""
        self.row_parallel = row_parallel(self.layers, self.like, self.backend)

    def _layers(self, x: torch.Tensor, trunk: ForwardContext) -> torch.Tensor:
        """The hidden rows after all layers: all of them, or those of ``trunk.wanted``."""
        if self.row_parallel is not None and self.row_parallel.suits(x):
            return self.row_parallel.run(x, (), trunk)
        for layer in self.layers[:-1]:
            x = layer.compute(x, trunk)
        return self.layers[-1].compute(x, trunk, trunk.wanted)
