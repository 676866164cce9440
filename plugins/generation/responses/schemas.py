"""What ``/v1/responses`` takes."""

from __future__ import annotations

from typing import Annotated, Any

from msgspec import Meta, Struct

from trunkline.core.server.api import (
    Ignored,
    IgnoredAccountingField,
    Refused,
    TemplateVariables,
    Unsupported,
    UnsupportedUnlessNull,
)
from trunkline.core.types import CacheKey, Int64, RequestId
from trunkline.plugins.generation.openai.body_schemas import Float
from trunkline.plugins.generation.openai.tools import MAX_TOOLS

MAX_ITEMS = 4096

CacheHint = Annotated[Any, Ignored("prefixes are cached without being told")]
NoState = Annotated[
    Any, Refused("{field} is not supported: the server stores no responses. Send the earlier items as input.")
]


class ReasoningOptions(Struct):
    """How the model reasons, if its chat template has such a switch."""

    effort: str | None = None
    summary: Annotated[Any, Ignored("reasoning is returned as it is, without a summary")] = None
    generate_summary: Annotated[Any, Ignored("reasoning is returned as it is, without a summary")] = None
    context: Annotated[Any, Ignored("the chat template decides which reasoning the model sees again")] = None
    mode: Unsupported = None


class TextOptions(Struct):
    """The form of the answer: ``format`` is text, json_object or json_schema."""

    format: dict[str, Any] | None = None
    verbosity: Annotated[Any, Refused(neutral=("medium",))] = None


class ResponsesBody(Struct, kw_only=True):
    """OpenAI's request for a response. ``input`` is a text or a list of items. Unknown fields are ignored."""

    input: str | Annotated[list[dict[str, Any]], Meta(max_length=MAX_ITEMS)]
    model: str | None = None
    instructions: str | None = None
    max_output_tokens: Int64 | None = None
    temperature: Float | None = None
    top_p: Float | None = None
    stream: bool | None = False
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    tools: Annotated[list[dict[str, Any]], Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    metadata: dict[str, Any] | None = None
    # as on /v1/chat/completions
    top_k: Int64 | None = None
    min_p: Float | None = None
    seed: Int64 | None = None
    stop: str | list[str] | None = None
    frequency_penalty: Float | None = None
    presence_penalty: Float | None = None
    repetition_penalty: Float | None = None
    ignore_eos: bool | None = None
    chat_template_kwargs: TemplateVariables | None = None
    rid: RequestId | None = None
    priority: Int64 | None = None
    cache_salt: CacheKey | None = None
    # refused
    previous_response_id: NoState = None
    conversation: NoState = None
    background: Annotated[Any, Refused("{field} is not supported: the server stores no responses. Use stream.")] = None
    prompt: Annotated[Any, Refused("{field} is not supported: the server stores no prompts. Send their text.")] = None
    truncation: Annotated[
        Any, Refused("{field} can only be disabled: leave out earlier items instead.", neutral=("disabled",))
    ] = None
    top_logprobs: Annotated[Any, Refused("{field} is not supported here; /v1/chat/completions has it.")] = None
    image: Annotated[Any, Refused("{field} is not supported: this server makes no images.")] = None
    moderation: UnsupportedUnlessNull = None
    context_management: Unsupported = None
    # without an effect
    store: Annotated[Any, Ignored("the server stores no responses; the reply says so")] = None
    include: Annotated[
        Any,  # reasoning is never encrypted: its items have the text
        Refused(
            "{field} is not supported: leave it out or send an empty list.",
            neutral=([], ["reasoning.encrypted_content"]),
        ),
    ] = None
    stream_options: Annotated[Any, Ignored("events are never padded")] = None
    max_tool_calls: Annotated[Any, Ignored("it limits built-in tools, which are refused")] = None
    background_options: Annotated[Any, Ignored("it matters only with background, which is refused")] = None
    access_programs: IgnoredAccountingField = None
    user: IgnoredAccountingField = None
    safety_identifier: IgnoredAccountingField = None
    service_tier: Annotated[Any, Ignored("there is one tier")] = None
    prompt_cache_key: CacheHint = None
    prompt_cache_retention: CacheHint = None
    prompt_cache_options: CacheHint = None
