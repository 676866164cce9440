"""What ``/v1/chat/completions`` takes."""

from __future__ import annotations

from typing import Annotated, Any

from msgspec import Meta, Struct

from .schemas import INT64_MAX, INT64_MIN, CacheKey, Int64, RequestId

Float = Annotated[float, Meta(ge=-1e9, le=1e9)]  # outer bounds; sampling checks give the real ones
AnyInt = Annotated[int, Meta(ge=INT64_MIN, le=INT64_MAX)]


class StreamOptions(Struct):
    include_usage: bool | None = False


class ChatBody(Struct):
    """OpenAI's request, with SGLang's extra sampling fields. Unknown fields are ignored.

    Fields typed ``Any`` at the end belong to features that aren't built yet.
    """

    messages: list[dict[str, Any]]
    model: str | None = None
    max_tokens: AnyInt | None = None
    max_completion_tokens: AnyInt | None = None
    temperature: Float | None = None
    top_p: Float | None = None
    n: AnyInt | None = None
    seed: Int64 | None = None
    stop: str | list[str] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    # SGLang's extras
    top_k: AnyInt | None = None
    min_p: Float | None = None
    stop_token_ids: list[AnyInt] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    no_stop_trim: bool | None = None
    rid: RequestId | None = None
    priority: AnyInt | None = None
    cache_salt: CacheKey | None = None
    # not built yet: only neutral values pass
    frequency_penalty: Any = None
    presence_penalty: Any = None
    repetition_penalty: Any = None
    logit_bias: Any = None
    min_tokens: Any = None
    regex: Any = None
    ebnf: Any = None
    stop_regex: Any = None
    json_schema: Any = None
    structural_tag: Any = None
    logprobs: Any = None
    top_logprobs: Any = None
    response_format: Any = None
    tools: Any = None
    tool_choice: Any = None
    functions: Any = None
    function_call: Any = None
    audio: Any = None
    modalities: Any = None
    lora_path: Any = None
    session_params: Any = None
    session_id: Any = None
    custom_logit_processor: Any = None
    max_thinking_tokens: Any = None
    chat_template_kwargs: Any = None
    continue_final_message: Any = None
    return_hidden_states: Any = None


NEUTRAL: dict[str, tuple[Any, ...]] = {
    "response_format": ({"type": "text"},),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
}
"""Values besides null, false, 0 and empty that ask for nothing."""

REFUSED = (
    *("logprobs", "top_logprobs", "response_format", "tools", "tool_choice", "functions", "function_call"),
    *("audio", "modalities", "lora_path", "session_params", "chat_template_kwargs", "continue_final_message"),
    *("return_hidden_states", "session_id", "custom_logit_processor", "max_thinking_tokens"),
)
"""Checked against NEUTRAL; the penalties and grammars go through the sampling checks."""

SAMPLING = {
    **{name: name for name in ("temperature", "top_p", "top_k", "min_p", "n", "stop", "stop_token_ids")},
    **{name: name for name in ("ignore_eos", "skip_special_tokens", "no_stop_trim", "logit_bias")},
    **{name: name for name in ("frequency_penalty", "presence_penalty", "repetition_penalty")},
    **{name: name for name in ("regex", "ebnf", "stop_regex", "json_schema", "structural_tag")},
    "seed": "sampling_seed",
    "min_tokens": "min_new_tokens",
}
"""Field of the body -> key of the sampling parameters."""
