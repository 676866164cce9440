"""Descriptions of checkpoints before loading, of loaded models for stages, and of served models for the front."""

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
    """Where a model's files are. ``reference`` is the user's reference, ``path`` a local folder."""

    reference: str
    path: str


class ModelInfo(Struct, frozen=True, kw_only=True):
    """Description of a checkpoint, read from the JSON files in its folder without loading weights."""

    path: str  # local folder
    architecture: str  # transformers class, config.json "architectures"[0]
    model_type: str
    context_length: int  # tokens; the config's limit, or --context-length
    vocab_size: int
    hidden_size: int
    causal: bool
    num_experts: int = 0  # 0 = dense
    eos_token_ids: tuple[int, ...] = ()
    score_rows: str = ""  # the row that the head "score" is applied to: "first", "last" or "mean"; "" = no such head
    config: dict[str, Any] = {}  # the content of config.json


class Serves(Struct, frozen=True):
    """Whether a task can be served from a checkpoint.

    ``when`` is ``"default"``; ``"on_request"``: only with ``--task``; ``"no"``; or ``"alone"``: by default, and other
    tasks only with ``--task``. ``reason`` is the sentence for users with "on_request" and "no".

    Clients may expect one message for all tasks that a model doesn't serve where a stage of it decodes: that is the
    ``common_reason`` of a refused task. Each other refused task with a ``detail`` then answers both in place of its
    own ``reason``.
    """

    task: str
    when: str
    reason: str = ""
    common_reason: str = ""
    detail: str = ""


class ServedModel(Struct, frozen=True, kw_only=True):
    """Description of a loaded model for the front process."""

    name: str
    aliases: tuple[str, ...] = ()
    model_path: str  # as the user gave it
    tokenizer_path: str
    info: ModelInfo
    tasks: dict[str, bool]  # task -> whether its stage decodes
    refused: dict[str, str] = {}  # task -> reason why this model doesn't serve it
    max_total_tokens: int  # KV slots, or tokens of one pass for models without KV pool; bounds a request, too
    max_running_requests: int
    chunked_prefill_size: int = -1  # limit on the tokens of one pass, -1 = no limit
    dtype: str
    kv_cache_dtype: str | None = None  # of the KV pool; None without one
    attention_backend: str
    deterministic: bool = False  # whether a request has the same result, bit for bit, in any batch
    device: str = "cpu"  # where it is computed; "cuda:0" is the first GPU
    weight_version: str = "default"
    update_number: int = 0  # number of the weights: higher after each update
    label_number: int = 0  # of their label: higher after each change of it alone
    weights_sent: bool = False  # a client has sent the weights: they are in no folder, and end with the engine
    fused: str = ""  # a sentence about fused layers (core/model/fusion), for /model_info
    stored_as: str = ""  # which weights are stored otherwise than in dtype (hook trunkline_transforms), for /model_info
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
        """The prompt of a chat, as transformers makes it; a template may raise any exception."""


@dataclass(frozen=True, slots=True)
class Head:
    """Modules on top of the backbone.

    ``build(model)`` gets the loaded transformers model (backbone and head modules) and
    returns ``f(hidden [R, hidden_size]) -> Tensor [R, ...]``.
    ``reference(model, input_ids [1, T])`` runs the class's own ``forward`` and returns the expected result of
    ``f`` for the row that ``rows`` names, ``[1, ...]``. Core compares both at load and
    refuses the head's tasks if they differ (if the ``forward`` does more than its modules show).
    ``rows``: the ``"last"`` or the ``"first"`` position's row, or the ``"mean"`` of all.

    With ``float32``, ``f`` gets float32 rows, and modules outside the backbone that ``build`` uses
    are float32 copies. Without it (for heads as wide as the vocabulary) both have the model's dtype.
    """

    name: str
    build: Callable[[Any], Callable[[torch.Tensor], torch.Tensor]]
    reference: Callable[[Any, torch.Tensor], torch.Tensor] | None = None
    rows: str = "last"
    float32: bool = True


class Model(Protocol):
    """The interface of a loaded model for stages (engine process)."""

    @property
    def name(self) -> str:
        """The name under which the model is served."""

    @property
    def info(self) -> ModelInfo:
        """The checkpoint's description; ``info.context_length`` is the model's, not what memory allows."""

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer, None when the model has none."""

    @property
    def backend(self) -> Backend:
        """The kernels in use, as ``--attention-backend`` chose them."""

    @property
    def device(self) -> torch.device:
        """Where weights and hidden rows are."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of weights and hidden rows."""

    @property
    def max_request_tokens(self) -> int:
        """Upper bound on prompt + new tokens of one request."""

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
        """The layers with experts; None for a dense model."""

    @property
    def expert_observers(self) -> Sequence[ExpertObserver]:
        """The observers that the hook ``trunkline_expert_observers`` returned for this model."""
