"""Schemas of core's replies and of errors, for type checkers and for ``/openapi.json``."""

from __future__ import annotations

from typing import Any, Literal, NotRequired, TypedDict

# -- errors ----------------------------------------------------------------------------------


class Problem(TypedDict):
    """What is wrong."""

    message: str


class NativeError(TypedDict):
    """SGLang's object for arguments that can't be used."""

    error: Problem


class FlatError(TypedDict):
    """SGLang's object for bodies that can't be decoded, for its OpenAI routes, and for failures of the server."""

    object: Literal["error"]
    message: str
    type: str
    param: str | None
    code: int


class Detail(TypedDict):
    """What is wrong, in OpenAI's terms; ``param`` is the field."""

    message: str
    type: str
    param: str | None
    code: str | int | None


class OpenAIError(TypedDict):
    """OpenAI's object: unknown models, and 401 under /v1. Event streams have it too."""

    error: Detail


class Unauthorized(TypedDict):
    """SGLang's answer to a missing or wrong key."""

    error: Literal["Unauthorized"]


# -- what was computed -----------------------------------------------------------------------


class FinishReason(TypedDict):
    """Why a request ended: ``length`` (with ``length``), ``stop`` (with ``matched``) or ``abort``."""

    type: str
    length: NotRequired[int]
    matched: NotRequired[int | str | None]
    message: NotRequired[str]
    status_code: NotRequired[int | None]
    err_type: NotRequired[str | None]


class TruncationReport(TypedDict, total=False):
    """Keys of a truncated input: its number of tokens before truncation, if they were counted."""

    truncated: bool
    original_tokens: int


class ItemMeta(TruncationReport):
    """``meta_info`` of an item that produced no tokens."""

    id: str
    finish_reason: FinishReason
    prompt_tokens: int
    weight_version: str
    e2e_latency: float  # seconds
    cached_tokens: NotRequired[int]


class CachedTokens(TypedDict):
    """OpenAI's ``prompt_tokens_details``: tokens of the prompt that came from the cache."""

    cached_tokens: int


class Usage(TypedDict):
    """OpenAI's token counts."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: int
    prompt_tokens_details: NotRequired[CachedTokens]


# -- models ----------------------------------------------------------------------------------


class ModelInfo(TypedDict):
    """The five keys of SGLang's clients."""

    model_path: str
    is_generation: bool
    tokenizer_path: str
    preferred_sampling_params: str | None
    weight_version: str


class LongModelInfo(TypedDict):
    """More about a model; plugins add keys."""

    model_path: str
    is_generation: bool
    tokenizer_path: str
    preferred_sampling_params: dict[str, Any] | None
    weight_version: str
    served_model_name: str
    aliases: list[str]
    model_type: str
    architectures: list[str]
    context_length: int
    vocab_size: int
    max_total_num_tokens: int
    dtype: str
    kv_cache_dtype: str | None
    attention_backend: str
    deterministic: bool
    fused: str
    stored_as: str
    tasks: list[str]
    refused: dict[str, str]


class ServerInfo(TypedDict):
    """Settings under their flags' names, and the values in effect; plugins add keys."""

    model_path: str
    tokenizer_path: str
    served_model_name: str
    context_length: int
    weight_version: str
    status: str
    version: str
    max_total_num_tokens: int
    max_req_input_len: int
    internal_states: list[dict[str, Any]]


class WeightVersion(TypedDict):
    """The label of the weights."""

    weight_version: str


class ModelCard(TypedDict):
    """OpenAI's description of a model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int


class ModelList(TypedDict):
    """OpenAI's list of models."""

    object: Literal["list"]
    data: list[ModelCard]


# -- plugins ---------------------------------------------------------------------------------


class EnabledPlugin(TypedDict):
    """``POST /plugins/NAME/enable``: the tasks of that plugin that are served."""

    plugin: str
    tasks: list[str]


# -- weights ---------------------------------------------------------------------------------


class UpdateReply(TypedDict):
    """Whether the weights were updated, and why not."""

    success: bool
    message: str
    num_paused_requests: int


class VersionReply(TypedDict):
    """The new label of the weights."""

    success: bool
    message: str
    new_version: str
