"""``PackedModel``: forward passes of a transformers model over packed rows of tokens."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch

from trunkline.core.types import ModelInfo
from trunkline.kernels.layout import Layout

from .architecture import backbone_of, has_token_types, padded_only, position_offset
from .attention import EAGER, NAME, ForwardContext
from .padded import forward_padded
from .rotary import RotaryRegimes

if TYPE_CHECKING:
    from trunkline.core.cache.pool import KVPool
    from trunkline.kernels.backend import Backend


@dataclass(frozen=True, eq=False, kw_only=True)
class PackedModel:
    """A transformers model with weights, and its forward pass; what verification at load works on.

    ``whole`` is the transformers object, ``backbone`` its module below the head.
    """

    info: ModelInfo
    whole: Any
    backbone: Any
    backend: Backend
    device: torch.device
    dtype: torch.dtype
    padded: bool  # rows run as a padded batch with a mask, because its attention can't be replaced
    token_types: bool  # whether the model has embeddings of token types (first and second text of a pair)
    position_offset: int  # index of position 0 in the model's position table
    rotary: RotaryRegimes
    takes: frozenset[str]  # parameter names of the backbone's forward

    @classmethod
    def of(cls, whole: Any, info: ModelInfo, backend: Backend, device: torch.device, dtype: torch.dtype) -> Self:
        """The forward pass of ``whole``, whose rotary modules are changed in place."""
        backbone = backbone_of(whole)
        return cls(
            info=info,
            whole=whole,
            backbone=backbone,
            backend=backend,
            device=device,
            dtype=dtype,
            padded=padded_only(type(whole), info),
            token_types=has_token_types(backbone),
            position_offset=position_offset(backbone),
            rotary=RotaryRegimes(backbone, info.context_length),
            takes=frozenset(inspect.signature(backbone.forward).parameters),
        )

    @property
    def length_boundaries(self) -> tuple[int, ...]:
        """Lengths in tokens beyond which a sequence's rotary frequencies change, sorted; () for most models."""
        return self.rotary.boundaries

    @property
    def captures(self) -> bool:
        """Whether decode-only passes can be CUDA graphs."""
        return self.backend.captures and not self.padded

    @property
    def attention(self) -> str:
        """The name of the attention implementation in transformers."""
        return EAGER if self.padded else NAME

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        layout: Layout,
        pool: KVPool | None,
        token_types: torch.Tensor | None = None,
        wanted: torch.Tensor | None = None,
        lengths: torch.Tensor | None = None,
        embeds: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """One pass over packed rows, int64 ``[T]`` each: returns the hidden rows ``[T, hidden_size]`` after the final
        norm, or only those of the tokens ``wanted``.

        Positions count from 0 in every row; ``token_types`` None means 0. With a pool, keys and values of the new
        tokens are written to the slots ``layout.out_slots``. ``lengths``: the length of each token's sequence; None
        if none exceeds a boundary of :attr:`length_boundaries`. ``embeds``: int64 ``[N]``, indices of tokens, and
        float32 ``[N, width]``, which replace the embeddings of their ids.
        """
        context = ForwardContext(layout, pool, self.backend, wanted)
        return self.run(input_ids, positions, context, token_types, lengths, embeds)

    @torch.inference_mode()
    def run(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        context: ForwardContext,
        token_types: torch.Tensor | None = None,
        lengths: torch.Tensor | None = None,
        embeds: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """:meth:`forward` with the caller's context, which has more results after the pass."""
        tokens = self.keywords(positions, token_types)
        if embeds is None:
            tokens["input_ids"] = input_ids
        else:
            indices, values = embeds
            looked_up: torch.Tensor = self.backbone.get_input_embeddings()(input_ids)
            tokens["inputs_embeds"] = looked_up.index_put((indices.to(looked_up.device),), values.to(looked_up))
        if self.padded:
            hidden, picked = forward_padded(self.backbone, tokens, context.layout, self.length_boundaries), False
        else:
            rows = {name: values[None] for name, values in tokens.items()}
            with self.rotary.for_lengths(lengths):
                output = self.backbone(**rows, **self.cacheless, trunk=context)
            hidden, picked = output.last_hidden_state[0], getattr(output, "picked", False)
        return hidden if picked or context.wanted is None else hidden[context.wanted]

    def keywords(self, positions: torch.Tensor, token_types: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """Arguments of the backbone's ``forward`` beside ids, int64 ``[T]`` each."""
        given = {}
        if "position_ids" in self.takes:
            given["position_ids"] = positions + self.position_offset if self.position_offset else positions
        if token_types is not None:
            given["token_type_ids"] = token_types
        return given

    @property
    def cacheless(self) -> dict[str, Any]:
        """Arguments that disable transformers' own cache."""
        return {"past_key_values": None, "use_cache": False} if "past_key_values" in self.takes else {}
