"""``LoadedModel``: a verified model with its heads, its stages, and its tensors by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from trunkline.core.model.fusion.origins import read
from trunkline.core.types import ExpertLayers, ExpertObserver, Stage, Tokenizer

from .expert_watch import ExpertWatch
from .packed import PackedModel

if TYPE_CHECKING:
    from trunkline.core.cache.pool import KVShape
    from trunkline.core.model.sources.tensor_file import StoredTensor


@dataclass(frozen=True, eq=False, kw_only=True)
class LoadedModel(PackedModel):
    """The result of loading; implements :class:`trunkline.core.types.Model`.

    ``refused`` maps a head to the reason why it can't be used. ``stages`` is empty at first and filled by
    :func:`trunkline.core.engine.startup.assemble`, because stages are made from the loaded model.
    """

    name: str
    tokenizer: Tokenizer | None
    max_request_tokens: int
    kv_shapes: list[KVShape]
    kv_dtype: torch.dtype  # of the KV pool, if there is one: the model's, or int8
    heads: Mapping[str, Callable[[torch.Tensor], torch.Tensor]]
    refused: Mapping[str, str]
    fused: str  # a sentence about fused layers
    stored_as: str  # what transforms have changed; "" for nothing
    expert_watch: ExpertWatch | None  # of a mixture of experts
    unused: frozenset[str]  # names of the checkpoint's tensors that the class doesn't use
    stored: Mapping[str, StoredTensor]  # the checkpoint's tensors that can be read again
    stages: dict[str, Stage] = field(default_factory=dict)

    @property
    def expert_layers(self) -> ExpertLayers | None:
        """The layers with experts; None for a dense model."""
        return None if self.expert_watch is None else self.expert_watch.layers

    @property
    def expert_observers(self) -> tuple[ExpertObserver, ...]:
        """The observers of this model's routing."""
        return () if self.expert_watch is None else self.expert_watch.observers

    def tensor(self, name: str, rows: int) -> torch.Tensor | None:
        """The first ``rows`` rows of a checkpoint's tensor, read from memory; None when no tensor has this name."""
        return read(self.whole, name, rows)
