"""The forward pass over fused decoder layers; :mod:`.find_decoder` puts it into a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from trunkline.core.model.attention import ForwardContext

from .decoder_layer import FusedLayer, Norm
from .recorded import CAPACITY, RecordedLayers, can_replay
from .row_parallel import RowParallelLayers, row_parallel

if TYPE_CHECKING:
    from trunkline.kernels.backend import Backend


class FusedForward:
    """Replaces ``forward`` of a base model whose layers are all fused and share one rotary embedding.

    Calls that request more than the last hidden state run the class's own ``forward``.
    """

    def __init__(
        self,
        base: Any,
        layers: list[FusedLayer],
        norm: Norm,
        output: type,
        backend: Backend,
        like: Sequence[torch.Tensor],
    ) -> None:
        """``output``: the class of what ``base`` returns. ``like``: hidden rows, cos and sin, of any number of rows."""
        self.original, self.output = backend.row_invariant(base.forward), output
        self.embed, self.rotary = backend.row_invariant(base.embed_tokens), backend.row_invariant(base.rotary_emb)
        self.layers, self.norm, self.backend, self.like = layers, norm, backend, like
        self.replay = False  # whether short passes are recorded and replayed
        self.row_parallel: RowParallelLayers | None = None  # computes long passes
        self._recorded: RecordedLayers | None = None

    def forget(self) -> None:
        """Run launches one by one until :meth:`verify` is called: linear layers will be replaced."""
        self.replay, self.row_parallel, self._recorded = False, None, None

    def verify(self, tolerance: float) -> None:
        """Run several launches at once where results are the same: those of recorded passes within ``tolerance``, those
        of long ones with the same bits. See :func:`.can_replay` and :func:`.row_parallel`.
        """
        x, cos, _ = self.like
        self.replay = can_replay(self.layers, x.shape[-1], cos.shape[-1], x.dtype, self.backend, tolerance)
        if all(layer.mlp is None for layer in self.layers):
            self.row_parallel = row_parallel(self.layers, self.like, self.backend)

    def __call__(
        self,
        input_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        trunk: ForwardContext | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **others: Any,
    ) -> Any:
        """Ids and positions ``[1, T]``; returns transformers' output object, hidden ``[1, T, H]``.

        ``inputs_embeds`` ``[1, T, H]`` may stand in place of ids, and is overwritten.
        """
        one_input = (input_ids is None) != (inputs_embeds is None)
        more = any(value is not None and value is not False for value in others.values())
        if not one_input or position_ids is None or trunk is None or more:
            given = {} if inputs_embeds is None else {"inputs_embeds": inputs_embeds}
            return self.original(input_ids=input_ids, position_ids=position_ids, trunk=trunk, **given, **others)
        x = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        cos, sin = self.rotary(x, position_ids)
        x, picked = self._layers(x[0], cos[0].contiguous(), sin[0].contiguous(), trunk)
        result = self.output(last_hidden_state=self.norm(x)[None])
        result.picked = picked
        return result

    def _layers(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, trunk: ForwardContext
    ) -> tuple[torch.Tensor, bool]:
        """The hidden rows after all layers, and whether they are only those of ``trunk.wanted``."""
        if self.replay and trunk.pool is not None and len(x) <= CAPACITY:
            if self._recorded is None or not self._recorded.covers(trunk):
                self._recorded = RecordedLayers(self.layers, trunk, x, cos)
            return self._recorded.run(x, cos, sin, trunk)
        if self.row_parallel is not None and self.row_parallel.suits(x):
            return self.row_parallel.run(x, (cos, sin), trunk), trunk.wanted is not None
        for layer in self.layers[:-1]:
            x = layer.compute(x, cos, sin, trunk)
        # A mixture of experts must see all tokens: observers count them.
        wanted = trunk.wanted if self.layers[-1].mlp is None else None
        return self.layers[-1].compute(x, cos, sin, trunk, wanted), wanted is not None
