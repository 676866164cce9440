"""Schemas of the replies of OpenAI's routes, for type checkers and for ``/openapi.json``."""

from __future__ import annotations

from typing import Literal, NotRequired, TypedDict

from trunkline.core.server.api import Usage
from trunkline.plugins.generation.reply_schemas import WeightSpan


class Metadata(TypedDict):
    """Labels of the weights that generated the first choice."""

    weight_version: str
    weight_versions: NotRequired[list[WeightSpan]]  # if weights were updated while it was paused


# -- chat completions ------------------------------------------------------------------------


class RankedToken(TypedDict):
    """A token, its log-probability and its UTF-8. ``token`` has escapes if these bytes aren't whole characters."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(RankedToken):
    """A token of the output, and the most likely ones in its place."""

    top_logprobs: list[RankedToken]


class ChatLogprobLists(TypedDict):
    """An entry for each output token, of the end and of a stop string too."""

    content: list[TokenLogprob]
    refusal: None


class CalledFunction(TypedDict):
    """``arguments`` is a JSON object as text."""

    name: str
    arguments: str


class MessageToolCall(TypedDict):
    id: str
    type: Literal["function"]
    function: CalledFunction


class ChatMessage(TypedDict):
    """``content`` is null if there are only tool calls."""

    role: Literal["assistant"]
    content: str | None
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[MessageToolCall]]


class ChatChoice(TypedDict):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobLists | None
    token_ids: NotRequired[list[int]]  # with return_token_ids
    finish_reason: str | None
    matched_stop: int | str | None


class ReasoningTokens(TypedDict):
    reasoning_tokens: int  # with those of its markers


class ChatUsage(Usage):
    """OpenAI's token counts, with details of the output if reasoning is separated."""

    completion_tokens_details: NotRequired[ReasoningTokens]


class ChatReply(TypedDict):
    """OpenAI's chat completion."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: ChatUsage
    metadata: Metadata
    prompt_token_ids: NotRequired[list[int]]  # with return_token_ids


class FunctionDelta(TypedDict):
    name: NotRequired[str]
    arguments: str


class ToolCallDelta(TypedDict):
    """The first delta of a call has its id and its name, the next ones its arguments."""

    index: int
    id: NotRequired[str]
    type: NotRequired[Literal["function"]]
    function: FunctionDelta


class ChatDelta(TypedDict):
    role: NotRequired[Literal["assistant"]]
    content: NotRequired[str | None]
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[ToolCallDelta]]


class ChatChunkChoice(TypedDict):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobLists | None
    token_ids: NotRequired[list[int]]
    finish_reason: str | None
    matched_stop: NotRequired[int | str | None]


class ChatChunk(TypedDict):
    """A chunk of OpenAI's chat completion in a stream."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: NotRequired[ChatUsage | None]
    prompt_token_ids: NotRequired[list[int]]  # in the first chunk


# -- completions -----------------------------------------------------------------------------


class CompletionLogprobLists(TypedDict):
    """Lists with an item for each token. The prompt's first token has no log-probability."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]  # in characters


class CompletionChoice(TypedDict):
    index: int
    text: str
    logprobs: CompletionLogprobLists | None
    prompt_token_ids: NotRequired[list[int]]  # with return_token_ids
    token_ids: NotRequired[list[int]]
    finish_reason: str | None
    matched_stop: NotRequired[int | str | None]


class CompletionReply(TypedDict):
    """OpenAI's completion. Choices are in the order of the prompts, those of one prompt together."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
    metadata: Metadata


class CompletionChunk(TypedDict):
    """A chunk of OpenAI's completion in a stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: NotRequired[Usage | None]
