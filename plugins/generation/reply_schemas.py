"""What the routes answer. Records have further keys for what a request asks for beside text."""

from __future__ import annotations

from typing import Any, Literal, NotRequired, TypedDict

from trunkline.core.server.api import FinishReason, Usage

LogprobEntry = tuple[float | None, int, str | None]
"""Log-probability, token id, and the token's text with ``return_text_in_logprobs``."""


class WeightSpan(TypedDict):
    """Which output tokens were made with the weights of a label: from ``start`` on, before ``end``."""

    version: str
    start: int
    end: int


class GenerateMeta(TypedDict):
    """``meta_info`` of a sequence. ``finish_reason`` is null while it runs.

    Lists of log-probabilities have an item for each token; of the first of the prompt's there is no value.
    """

    id: str
    finish_reason: FinishReason | None
    prompt_tokens: int
    weight_version: str
    completion_tokens: int
    cached_tokens: int
    weight_versions: NotRequired[list[WeightSpan]]  # where the weights were updated in a pause
    input_token_logprobs: NotRequired[list[LogprobEntry]]
    output_token_logprobs: NotRequired[list[LogprobEntry]]
    input_top_logprobs: NotRequired[list[list[LogprobEntry] | None]]  # most likely first
    output_top_logprobs: NotRequired[list[list[LogprobEntry] | None]]
    input_token_ids_logprobs: NotRequired[list[list[LogprobEntry] | None]]  # in the order of token_ids_logprob
    output_token_ids_logprobs: NotRequired[list[list[LogprobEntry] | None]]
    hidden_states: NotRequired[list[Any]]  # a matrix, then vectors; or one vector (OpenAPI can't say so)
    routed_experts: NotRequired[str]  # base64 of int32 [positions, layers, experts of a token]; when it has ended
    e2e_latency: NotRequired[float]  # seconds; when it has ended


class GenerateRecord(TypedDict):
    """A sequence in SGLang's native API. In a stream all is cumulative, and ``index`` tells sequences apart."""

    text: NotRequired[str]
    output_ids: list[int]
    prompt_token_ids: NotRequired[list[int]]  # with return_prompt_token_ids
    meta_info: GenerateMeta
    index: NotRequired[int]


class ChatMessage(TypedDict):
    role: Literal["assistant"]
    content: str | None


class ChatChoice(TypedDict):
    index: int
    message: ChatMessage
    finish_reason: str | None
    matched_stop: int | str | None


class ChatMetadata(TypedDict):
    weight_version: str


class ChatReply(TypedDict):
    """OpenAI's chat completion."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    metadata: ChatMetadata


class ChatDelta(TypedDict):
    role: NotRequired[Literal["assistant"]]
    content: NotRequired[str | None]


class ChunkChoice(TypedDict):
    index: int
    delta: ChatDelta
    finish_reason: str | None
    matched_stop: NotRequired[int | str | None]


class ChatChunk(TypedDict):
    """A part of OpenAI's chat completion, as a stream has it."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: NotRequired[Usage | None]
