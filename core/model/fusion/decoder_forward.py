"""The forward pass over fused decoder layers; :mod:`.find_decoder` puts it into a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from trunkline.core.model.attention import ForwardContext

from .decoder_layer import FusedLayer, Norm
from .recorded import CAPACITY, RecordedLayers

if TYPE_CHECKING:
    from trunkline.kernels.backend import Backend


class FusedForward:
    """Replaces ``forward`` of a base model whose layers are all fused and share one rotary embedding.

    Calls that request more than the last hidden state run the class's own ``forward``.
    """

    def __init__(self, base: Any, layers: list[FusedLayer], norm: Norm, output: type, backend: Backend) -> None:
        """``output``: the class of what ``base`` returns."""
        self.original, self.output = backend.row_invariant(base.forward), output
        self.embed, self.rotary = backend.row_invariant(base.embed_tokens), backend.row_invariant(base.rotary_emb)
        self.layers, self.norm = layers, norm
        self.replay = False  # whether short passes are recorded and replayed
        self.check_replay: Callable[[float], bool] = lambda _: False  # whether they can be, see can_replay
        self._recorded: RecordedLayers | None = None

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
        for layer in self.layers[:-1]:
            x = layer.compute(x, cos, sin, trunk)
        # A mixture of experts must see all tokens: observers count them.
        wanted = trunk.wanted if self.layers[-1].mlp is None else None
        return self.layers[-1].compute(x, cos, sin, trunk, wanted), wanted is not None
