"""Checkpoints and loaded models: what is known before loading, what stages get, what the front knows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from msgspec import Struct

from .experts import ExpertLayers, ExpertObserver
from .stages import Stage

if TYPE_CHECKING:
    import torch

    from trunkline.kernels.backend import Backend


class ModelSource(Struct, frozen=True):
    """Where a model's files are. ``reference`` is what the user wrote, ``path`` a local folder."""

    reference: str
    path: str


class ModelInfo(Struct, frozen=True, kw_only=True):
    """What a checkpoint is, read from its folder before anything heavy is loaded."""

    path: str  # local folder
    architecture: str  # transformers class, config.json "architectures"[0]
    model_type: str
    context_length: int  # tokens; the config's limit, or the smaller one that was asked for
    vocab_size: int
    hidden_size: int
    causal: bool
    num_experts: int = 0  # 0 = dense
    eos_token_ids: tuple[int, ...] = ()
    score_rows: str = ""  # what the head "score" is applied to: the "first", "last" or "mean" row; "" = no such head
    config: dict[str, Any] = {}  # config.json as it stands


class Serves(Struct, frozen=True):
    """A task's answer to "can you serve this checkpoint?".

    ``when`` is ``"default"``, ``"on_request"`` (only with ``--task``), ``"no"``, or ``"alone"``: by default,
    and what other tasks serve by default is on request then. ``reason`` is the sentence that users see for
    "on_request" and "no"; ``reason_beside_decoding`` the one where the model has a stage that decodes,
    if that differs.
    """

    task: str
    when: str
    reason: str = ""
    reason_beside_decoding: str = ""


class ServedModel(Struct, frozen=True, kw_only=True):
    """A model as the front process knows it, after the engine has loaded it."""

    name: str
    aliases: tuple[str, ...] = ()
    model_path: str  # as the user gave it
    tokenizer_path: str
    info: ModelInfo
    tasks: dict[str, bool]  # task -> does its stage decode
    refused: dict[str, str] = {}  # task -> why this model doesn't serve it
    max_total_tokens: int  # KV slots, or tokens of one pass where nothing is kept; bounds a request, too
    max_running_requests: int
    chunked_prefill_size: int = -1  # most tokens of one pass, -1 = no limit
    dtype: str
    attention_backend: str
    weight_version: str = "default"
    fused: str = ""  # what became of the layers (core/model/fusion), for /model_info
    skip_tokenizer_init: bool = False  # whether it has no tokenizer because the user said so

    @property
    def is_generation(self) -> bool:
        """Whether any of its stages decodes."""
        return any(self.tasks.values())

    @property
    def max_request_tokens(self) -> int:
        """Upper bound on prompt + new tokens of one request."""
        return min(self.info.context_length, self.max_total_tokens)


class Tokenizer(Protocol):
    """The part of transformers' fast tokenizer that core and plugins use."""

    chat_template: str | None
    eos_token_id: int | None
    all_special_ids: list[int]

    def encode(self, text: str, *, add_special_tokens: bool = ...) -> list[int]:
        """Token ids of a text, by default with the special tokens around it."""

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = ...) -> str:
        """The text of token ids, by default with special tokens."""

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any:
        """The prompt of a chat, as transformers makes it; raises whatever the template raises."""


@dataclass(frozen=True, slots=True)
class Head:
    """Modules on top of the backbone.

    ``build(model)`` gets the loaded transformers class (backbone and its own head modules) and
    returns ``f(hidden [R, hidden_size]) -> Tensor [R, ...]``.
    ``reference(model, input_ids [1, T])`` runs the class's own ``forward`` and returns what
    ``f`` must give for the row that ``rows`` names, ``[1, ...]``; core compares both at load and
    refuses the head's tasks when they differ (models whose ``forward`` does more than its parts).
    ``rows``: the ``"last"`` or the ``"first"`` position's row, or the ``"mean"`` of all.

    With ``float32``, ``f`` gets float32 rows, and the modules that ``build`` finds beside the backbone
    are float32 copies. Without it (heads as wide as the vocabulary) both have the model's dtype.
    """

    name: str
    build: Callable[[Any], Callable[[torch.Tensor], torch.Tensor]]
    reference: Callable[[Any, torch.Tensor], torch.Tensor] | None = None
    rows: str = "last"
    float32: bool = True


class Model(Protocol):
    """A loaded model, as stages see it (engine process)."""

    name: str
    info: ModelInfo
    tokenizer: Tokenizer | None
    backend: Backend  # the kernels in use, as ``--attention-backend`` chose them
    device: torch.device
    dtype: torch.dtype
    max_request_tokens: int

    @property
    def heads(self) -> Mapping[str, Callable[[torch.Tensor], torch.Tensor]]:
        """The verified heads by name.

        Core's own: "lm" gives the logits ``[R, vocab_size]`` of every causal checkpoint with an output matrix,
        "score" the scores ``[R, labels]`` of a ``…ForSequenceClassification``. Another head of the model is there
        when the task of its plugin is active.
        """

    @property
    def stages(self) -> Mapping[str, Stage]:
        """The active stages by task; empty until ``trunkline_stages`` was called."""

    @property
    def expert_layers(self) -> ExpertLayers | None:
        """Where tokens are sent to experts; None for a dense model."""

    @property
    def expert_observers(self) -> Sequence[ExpertObserver]:
        """Those that ``trunkline_expert_observers`` gave for this model."""
