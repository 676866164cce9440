"""The fields that the bodies of ``/v1/completions`` and ``/v1/chat/completions`` have in common."""

from __future__ import annotations

from typing import Annotated, Any

from msgspec import Meta, Struct

from trunkline.core.server.api import (
    Ignored,
    IgnoredAccountingField,
    IgnoredMediaOption,
    IgnoredPlacementField,
    IgnoredTruncationSide,
    Refused,
    Unsupported,
    UnsupportedUnlessNull,
)
from trunkline.core.types import CacheKey, Int64, RequestId, TokenId
from trunkline.plugins.generation.native.body_schemas import ExpertsOption, LogitProcessor

Float = Annotated[float, Meta(ge=-1e9, le=1e9)]  # outer bounds; sampling checks give the real ones
Biases = Annotated[dict[str, Float], Meta(max_length=1024)]
GuidedOption = Annotated[Any, Ignored("the grammar engine alone decides it")]


class StreamOptions(Struct):
    """``continuous_usage_stats`` adds the usage so far to every chunk, as in vLLM and SGLang."""

    include_usage: bool | None = False
    continuous_usage_stats: bool | None = False
    include_obfuscation: Annotated[Any, Ignored("chunks are never padded")] = None


class CommonBody(Struct, kw_only=True):
    """OpenAI's fields, with those that SGLang and vLLM add. Unknown fields are ignored."""

    model: str | None = None
    max_tokens: Int64 | None = None
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
    response_format: dict[str, Any] | None = None
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
    json_schema: str | dict[str, Any] | None = None
    regex: str | None = None
    ebnf: str | None = None
    structural_tag: str | dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    rid: RequestId | None = None
    priority: Int64 | None = None
    cache_salt: CacheKey | None = None
    extra_key: CacheKey | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    # refused
    vllm_xargs: Unsupported = None
    kv_transfer_params: Unsupported = None
    ec_transfer_params: Unsupported = None
    lora_path: Unsupported = None
    session_params: Unsupported = None
    session_id: Unsupported = None
    custom_logit_processor: LogitProcessor = None
    logits_processors: LogitProcessor = None
    thinking_token_budget: UnsupportedUnlessNull = None
    return_hidden_states: Unsupported = None
    return_routed_experts: Unsupported = None
    return_cached_tokens_details: Unsupported = None
    truncate_prompt_tokens: UnsupportedUnlessNull = None
    use_beam_search: Unsupported = None
    include_stop_str_in_output: Annotated[Any, Refused("{field} is not supported; no_stop_trim does the same.")] = None
    allowed_token_ids: Unsupported = None
    bad_words: Unsupported = None
    logprob_token_ids: Unsupported = None
    repetition_detection: Unsupported = None
    watermarking: Unsupported = None
    # without an effect
    user: IgnoredAccountingField = None
    store: IgnoredAccountingField = None
    metadata: IgnoredAccountingField = None
    request_id: Annotated[Any, Ignored("rid is the request's id")] = None
    spaces_between_special_tokens: Annotated[Any, Ignored("fast tokenizers put no spaces there")] = None
    length_penalty: Annotated[Any, Ignored("it matters only with use_beam_search")] = None
    guided_decoding_backend: GuidedOption = None
    guided_whitespace_pattern: GuidedOption = None
    truncation_side: IgnoredTruncationSide = None
    routed_experts_start_len: ExpertsOption = None
    routed_experts_prompt_start: ExpertsOption = None
    return_token_offsets: Annotated[Any, Ignored("only routes that show a prompt have it")] = None
    stream_interval: Annotated[Any, Ignored("chunks are sent as tokens come")] = None
    mm_processor_kwargs: IgnoredMediaOption = None
    return_mm_kwargs: IgnoredMediaOption = None
    images_config: IgnoredMediaOption = None
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
}
"""Field of both bodies -> key of the sampling parameters."""
