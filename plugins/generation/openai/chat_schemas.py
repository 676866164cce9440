"""What ``/v1/chat/completions`` takes."""

from __future__ import annotations

from typing import Annotated, Any

from msgspec import Meta, Struct

from trunkline.core.server.api import (
    ChatMessages,
    Ignored,
    IgnoredAccountingField,
    IgnoredMediaOption,
    IgnoredPlacementField,
    IgnoredTruncationSide,
    Refused,
    TemplateVariables,
    Unsupported,
    UnsupportedMedia,
    UnsupportedUnlessNull,
)
from trunkline.core.types import CacheKey, Int64, RequestId, TokenId
from trunkline.plugins.generation.native.body_schemas import ExpertsOption, LogitProcessor

Float = Annotated[float, Meta(ge=-1e9, le=1e9)]  # outer bounds; sampling checks give the real ones
Biases = Annotated[dict[str, Float], Meta(max_length=1024)]
CacheHint = Annotated[Any, Ignored("prefixes are cached without being told")]
GuidedOption = Annotated[Any, Ignored("it matters only with guided_json and its like, which are refused")]
ReasoningParser = Annotated[Any, Ignored("no reasoning parser is built in: what a model thinks is part of its content")]


class StreamOptions(Struct):
    """``continuous_usage_stats`` adds the usage so far to every chunk, as in vLLM and SGLang."""

    include_usage: bool | None = False
    continuous_usage_stats: bool | None = False
    include_obfuscation: Annotated[Any, Ignored("chunks are never padded")] = None


class ChatBody(Struct):
    """OpenAI's request, with extra fields of SGLang and vLLM. Unknown fields are ignored."""

    messages: ChatMessages
    model: str | None = None
    max_tokens: Int64 | None = None
    max_completion_tokens: Int64 | None = None
    temperature: Float | None = None
    top_p: Float | None = None
    n: Int64 | None = None
    seed: Int64 | None = None
    stop: str | list[str] | None = None
    frequency_penalty: Float | None = None
    presence_penalty: Float | None = None
    logit_bias: Biases | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    reasoning_effort: str | None = None
    # SGLang's and vLLM's extras
    top_k: Int64 | None = None
    min_p: Float | None = None
    stop_token_ids: list[TokenId] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    no_stop_trim: bool | None = None
    stop_regex: str | list[str] | None = None
    min_tokens: Int64 | None = None
    repetition_penalty: Float | None = None
    custom_params: dict[str, Any] | None = None
    rid: RequestId | None = None
    priority: Int64 | None = None
    cache_salt: CacheKey | None = None
    extra_key: CacheKey | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: TemplateVariables | None = None
    # OpenAI's, refused
    logprobs: Unsupported = None
    top_logprobs: Unsupported = None
    response_format: Annotated[Any, Refused(neutral=({"type": "text"},))] = None
    tools: Unsupported = None
    tool_choice: Annotated[Any, Refused(neutral=("none", "auto"))] = None
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
    regex: Unsupported = None
    ebnf: Unsupported = None
    json_schema: Unsupported = None
    structural_tag: Unsupported = None
    structured_outputs: Unsupported = None
    guided_json: Unsupported = None
    guided_regex: Unsupported = None
    guided_choice: Unsupported = None
    guided_grammar: Unsupported = None
    reasoning: Annotated[Any, Refused("{field} is not supported; reasoning_effort and chat_template_kwargs are.")] = (
        None
    )
    task: Unsupported = None
    vllm_xargs: Unsupported = None
    kv_transfer_params: Unsupported = None
    ec_transfer_params: Unsupported = None
    lora_path: Unsupported = None
    session_params: Unsupported = None
    session_id: Unsupported = None
    custom_logit_processor: LogitProcessor = None
    logits_processors: LogitProcessor = None
    max_thinking_tokens: UnsupportedUnlessNull = None
    thinking_token_budget: UnsupportedUnlessNull = None
    include_reasoning: Annotated[Any, Refused(neutral=(True,), empty=False)] = None
    return_hidden_states: Unsupported = None
    return_routed_experts: Unsupported = None
    return_prompt_token_ids: Unsupported = None
    return_token_ids: Unsupported = None
    return_meta_info: Unsupported = None
    return_cached_tokens_details: Unsupported = None
    return_prompt_text: Unsupported = None
    documents: Unsupported = None
    echo: Unsupported = None
    add_special_tokens: Unsupported = None
    truncate_prompt_tokens: UnsupportedUnlessNull = None
    best_of: Annotated[Any, Refused(neutral=(1,))] = None
    use_beam_search: Unsupported = None
    include_stop_str_in_output: Annotated[Any, Refused("{field} is not supported; no_stop_trim does the same.")] = None
    allowed_token_ids: Unsupported = None
    bad_words: Unsupported = None
    prompt_logprobs: UnsupportedUnlessNull = None
    logprob_token_ids: Unsupported = None
    repetition_detection: Unsupported = None
    watermarking: Unsupported = None
    # without an effect
    user: IgnoredAccountingField = None
    store: IgnoredAccountingField = None
    metadata: IgnoredAccountingField = None
    service_tier: Annotated[Any, Ignored("there is one tier")] = None
    safety_identifier: IgnoredAccountingField = None
    request_id: Annotated[Any, Ignored("rid is the request's id")] = None
    prompt_cache_key: CacheHint = None
    prompt_cache_retention: CacheHint = None
    prompt_cache_options: CacheHint = None
    prediction: Annotated[Any, Ignored("it could only make the answer come sooner")] = None
    parallel_tool_calls: Annotated[Any, Ignored("it matters only with tools")] = None
    separate_reasoning: ReasoningParser = None
    stream_reasoning: ReasoningParser = None
    spaces_between_special_tokens: Annotated[Any, Ignored("fast tokenizers put no spaces there")] = None
    return_tokens_as_token_ids: Annotated[Any, Ignored("it matters only with logprobs")] = None
    length_penalty: Annotated[Any, Ignored("it matters only with use_beam_search")] = None
    guided_decoding_backend: GuidedOption = None
    guided_whitespace_pattern: GuidedOption = None
    truncation_side: IgnoredTruncationSide = None
    routed_experts_start_len: ExpertsOption = None
    routed_experts_prompt_start: ExpertsOption = None
    return_token_offsets: Annotated[Any, Ignored("only routes that show a prompt have it")] = None
    stream_interval: Annotated[Any, Ignored("chunks are sent as tokens come")] = None
    ngram_corpus_id: Annotated[Any, Ignored("it could only make the answer come sooner")] = None
    mm_processor_kwargs: IgnoredMediaOption = None
    media_io_kwargs: IgnoredMediaOption = None
    return_mm_kwargs: IgnoredMediaOption = None
    images_config: IgnoredMediaOption = None
    max_dynamic_patch: IgnoredMediaOption = None
    min_dynamic_patch: IgnoredMediaOption = None
    use_audio_in_video: IgnoredMediaOption = None
    data_parallel_rank: IgnoredPlacementField = None
    routed_dp_rank: IgnoredPlacementField = None
    bootstrap_host: IgnoredPlacementField = None
    bootstrap_port: IgnoredPlacementField = None
    bootstrap_room: IgnoredPlacementField = None
    disagg_prefill_dp_rank: IgnoredPlacementField = None


SAMPLING = {
    **{name: name for name in ("temperature", "top_p", "top_k", "min_p", "n", "stop", "stop_token_ids")},
    **{name: name for name in ("ignore_eos", "skip_special_tokens", "no_stop_trim", "stop_regex", "custom_params")},
    **{name: name for name in ("frequency_penalty", "presence_penalty", "repetition_penalty", "logit_bias")},
    "min_tokens": "min_new_tokens",
    "seed": "sampling_seed",
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",  # the newer name wins
}
"""Field of the body -> key of the sampling parameters."""
