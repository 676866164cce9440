"""What ``/v1/chat/completions`` takes."""

from __future__ import annotations

from typing import Annotated, Any

from trunkline.core.server.api import (
    ChatMessages,
    Ignored,
    IgnoredAccountingField,
    IgnoredMediaOption,
    Refused,
    TemplateVariables,
    Unsupported,
    UnsupportedMedia,
    UnsupportedUnlessNull,
)
from trunkline.core.types import Int64

from .body_schemas import CommonBody
from .tools import Tools

CacheHint = Annotated[Any, Ignored("prefixes are cached without being told")]


class ChatBody(CommonBody, kw_only=True):
    """OpenAI's request for a chat completion."""

    messages: ChatMessages
    max_completion_tokens: Int64 | None = None
    logprobs: bool | None = None
    top_logprobs: Int64 | None = None
    reasoning_effort: str | None = None
    # SGLang's and vLLM's extras
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: TemplateVariables | None = None
    tools: Tools | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    separate_reasoning: bool | None = None
    stream_reasoning: bool | None = None
    include_reasoning: bool | None = None
    # OpenAI's, refused
    functions: Unsupported = None
    function_call: Annotated[Any, Refused(neutral=("none", "auto"))] = None
    audio: UnsupportedMedia = None
    modalities: Annotated[Any, Refused(neutral=(["text"],))] = None
    moderation: UnsupportedUnlessNull = None
    verbosity: Annotated[Any, Refused(neutral=("medium",))] = None
    web_search_options: UnsupportedUnlessNull = None
    # SGLang's and vLLM's, refused
    chat_template: Annotated[
        Any, Refused("{field} can't be sent: the server takes templates from its operator only (--chat-template FILE).")
    ] = None
    input_ids: Annotated[Any, Refused("{field} belongs to /generate; a chat is made of messages.")] = None
    reasoning: Annotated[Any, Refused("{field} is not supported; reasoning_effort and chat_template_kwargs are.")] = (
        None
    )
    task: Unsupported = None
    max_thinking_tokens: UnsupportedUnlessNull = None
    return_prompt_token_ids: Annotated[Any, Refused("{field} is not supported; return_token_ids is.")] = None
    return_meta_info: Unsupported = None
    return_prompt_text: Unsupported = None
    documents: Unsupported = None
    echo: Unsupported = None
    add_special_tokens: Unsupported = None
    best_of: Annotated[Any, Refused(neutral=(1,))] = None
    prompt_logprobs: UnsupportedUnlessNull = None
    # without an effect
    service_tier: Annotated[Any, Ignored("there is one tier")] = None
    safety_identifier: IgnoredAccountingField = None
    prompt_cache_key: CacheHint = None
    prompt_cache_retention: CacheHint = None
    prompt_cache_options: CacheHint = None
    prediction: Annotated[Any, Ignored("it could only make the answer come sooner")] = None
    ngram_corpus_id: Annotated[Any, Ignored("it could only make the answer come sooner")] = None
    media_io_kwargs: IgnoredMediaOption = None
    max_dynamic_patch: IgnoredMediaOption = None
    min_dynamic_patch: IgnoredMediaOption = None
    use_audio_in_video: IgnoredMediaOption = None
