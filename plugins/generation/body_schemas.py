"""What ``/generate`` takes."""

from __future__ import annotations

from typing import Annotated, Any

from msgspec import Struct

from trunkline.core.server.api import Accounting, Ignored, Later, Media, OnlyNull, Placement, Refused

from .schemas import CacheKey, Int64, RequestId, TokenId

LogitProcessor = Annotated[
    Any,
    Refused(
        "The server is not configured to enable custom logit processor. "
        "Please set `--enable-custom-logit-processor` to enable this feature."
    ),
]
ProcessorOnly = Annotated[Any, Ignored("only a custom logit processor reads it")]
LogprobOption = Annotated[Any, Ignored("it matters only with return_logprob")]


class GenerateBody(Struct):
    """``POST /generate``. Unknown top-level fields are ignored; ``sampling_params`` are checked apart."""

    text: str | list[str] | None = None
    input_ids: list[TokenId | list[TokenId]] | None = None
    sampling_params: dict[str, Any] | list[dict[str, Any]] | None = None
    rid: RequestId | list[RequestId] | None = None
    stream: bool | None = False
    model: str | None = None
    priority: Int64 | None = None
    extra_key: CacheKey | None = None
    cache_salt: CacheKey | None = None
    return_logprob: Later = None
    return_hidden_states: Later = None
    input_embeds: Later = None
    image_data: Media = None
    video_data: Media = None
    audio_data: Media = None
    lora_path: Later = None
    custom_logit_processor: LogitProcessor = None
    session_params: Later = None
    session_id: Later = None
    return_prompt_token_ids: Later = None
    return_routed_experts: Later = None
    return_sampling_mask: Later = None
    max_thinking_tokens: OnlyNull = None
    watermark: Later = None
    logprob_start_len: LogprobOption = None
    top_logprobs_num: LogprobOption = None
    token_ids_logprob: LogprobOption = None
    return_text_in_logprobs: LogprobOption = None
    modalities: Annotated[Any, Ignored("it describes images, which are refused")] = None
    log_metrics: Accounting = None
    no_logs: Accounting = None
    background: Accounting = None
    conversation_id: Accounting = None
    custom_labels: Accounting = None
    data_parallel_rank: Placement = None
    routed_dp_rank: Placement = None
    bootstrap_host: Placement = None
    bootstrap_port: Placement = None
    bootstrap_room: Placement = None
