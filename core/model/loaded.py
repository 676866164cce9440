"""A model that is ready to run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from trunkline.kernels.layout import Layout

from ..types import ModelInfo, Stage, Tokenizer
from .architecture import backbone_of
from .attention import ForwardContext

if TYPE_CHECKING:
    from trunkline.kernels.backend import Backend

    from ..cache.pool import KVPool, KVShape


@dataclass(eq=False)
class LoadedModel:
    """Weights, heads and the one way to run them; implements :class:`trunkline.core.types.Model`.

    ``whole`` is the transformers object, ``backbone`` what it runs under its head. ``refused`` maps
    a head to the reason why it can't be used. Tokenizer, stages and ``max_request_tokens`` are
    filled in by the engine.
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
    backbone: Any = field(init=False)

    def __post_init__(self) -> None:
        self.backbone = backbone_of(self.whole)

    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor, layout: Layout, pool: KVPool | None
    ) -> torch.Tensor:
        """One pass over packed rows: ids and positions int64 ``[T]`` -> hidden ``[T, hidden_size]``.

        Hidden is what heads want: after the final norm. With a pool the new tokens' keys and
        values are put where ``layout.out_slots`` says.
        """
        return self.run(input_ids, positions, ForwardContext(layout, pool, self.backend))

    @torch.inference_mode()
    def run(self, input_ids: torch.Tensor, positions: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        """:meth:`forward` with a context of the caller's, who may look at it afterwards."""
        output = self.backbone(
            input_ids=input_ids[None],
            position_ids=positions[None],
            past_key_values=None,
            use_cache=False,
            trunk=context,
        )
        hidden: torch.Tensor = output.last_hidden_state[0]
        return hidden
