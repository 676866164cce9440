"""``LoadedModel``: a model with weights, heads and forward pass, and its tensors by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from trunkline.core.model.fusion.origins import read
from trunkline.core.types import ExpertLayers, ExpertObserver, ModelInfo, Stage, Tokenizer
from trunkline.kernels.layout import Layout

from .architecture import backbone_of, has_token_types, position_offset
from .attention import EAGER, NAME, ForwardContext
from .expert_watch import ExpertWatch
from .padded import forward_padded
from .rotary import RotaryRegimes

if TYPE_CHECKING:
    from trunkline.core.cache.pool import KVPool, KVShape
    from trunkline.core.model.sources.tensor_file import StoredTensor
    from trunkline.kernels.backend import Backend


@dataclass(eq=False)
class LoadedModel:
    """Weights, heads and forward pass; implements :class:`trunkline.core.types.Model`.

    ``whole`` is the transformers object, ``backbone`` its module below the head. ``refused`` maps
    a head to the reason why it can't be used. ``stages`` is set after loading.
    """

    name: str
    info: ModelInfo
    whole: Any
    backend: Backend
    device: torch.device
    dtype: torch.dtype
    kv_shapes: list[KVShape] = field(default_factory=list)
    heads: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    fused: str = ""
    tokenizer: Tokenizer | None = None
    stages: dict[str, Stage] = field(default_factory=dict)
    max_request_tokens: int = 0
    expert_watch: ExpertWatch | None = None  # of a mixture of experts
    unused: frozenset[str] = frozenset()  # names of the checkpoint's tensors that the class doesn't use
    stored: Mapping[str, StoredTensor] = field(default_factory=dict)  # the checkpoint's tensors that can be read again
    padded: bool = False  # rows run as a padded batch with a mask, because its attention can't be replaced
    backbone: Any = field(init=False)
    token_types: bool = field(init=False)
    position_offset: int = field(init=False)  # index of position 0 in the model's position table
    rotary: RotaryRegimes = field(init=False)
    takes: frozenset[str] = field(init=False)  # parameter names of the backbone's forward

    def __post_init__(self) -> None:
        self.backbone = backbone_of(self.whole)
        self.rotary = RotaryRegimes(self.backbone, self.info.context_length)
        self.token_types = has_token_types(self.backbone)
        self.position_offset = position_offset(self.backbone)
        self.takes = frozenset(inspect.signature(self.backbone.forward).parameters)

    @property
    def expert_layers(self) -> ExpertLayers | None:
        """The layers with experts; None for a dense model."""
        return None if self.expert_watch is None else self.expert_watch.layers

    @property
    def expert_observers(self) -> tuple[ExpertObserver, ...]:
        """The observers of this model's routing."""
        return () if self.expert_watch is None else self.expert_watch.observers

    @property
    def length_boundaries(self) -> tuple[int, ...]:
        """Lengths in tokens beyond which a sequence's rotary frequencies change, sorted; () for most models."""
        return self.rotary.boundaries

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

    def tensor(self, name: str, rows: int) -> torch.Tensor | None:
        """The first ``rows`` rows of a checkpoint's tensor, read from memory; None when no tensor has this name."""
        return read(self.whole, name, rows)

    @property
    def cacheless(self) -> dict[str, Any]:
        """Arguments that disable transformers' own cache."""
        return {"past_key_values": None, "use_cache": False} if "past_key_values" in self.takes else {}
