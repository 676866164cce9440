"""The bodies of ``/generate`` and of the session routes."""

from __future__ import annotations

from typing import Annotated, Any

from msgspec import Meta, Struct

from trunkline.core.server.api import (
    Ignored,
    IgnoredAccountingField,
    IgnoredMediaOption,
    IgnoredPlacementField,
    Refused,
    Unsupported,
    UnsupportedMedia,
    UnsupportedUnlessNull,
)
from trunkline.core.types import CacheKey, Int64, RequestId, TokenId

LogitProcessor = Annotated[
    Any,
    Refused(
        "The server is not configured to enable custom logit processor. "
        "Please set `--enable-custom-logit-processor` to enable this feature."
    ),
]
ExpertsOption = Annotated[Any, Ignored("it matters only with return_routed_experts")]
Component = Annotated[float, Meta(ge=-3.4e38, le=3.4e38)]  # of an embedding; in the range of float32
MAX_SESSION_TIMEOUT = 86400.0  # seconds


class SessionParams(Struct, forbid_unknown_fields=True):
    """The request ``rid`` of session ``id``, which a prompt continues. Without ``rid`` it begins a new root."""

    id: RequestId | None = None
    rid: RequestId | None = None
    offset: Int64 | None = None
    replace: bool | None = False
    drop_previous_output: bool | None = False


class OpenSessionBody(Struct):
    """``/open_session``. ``timeout``: seconds without a request after which the session is closed."""

    capacity_of_str_len: Annotated[
        Int64, Ignored("sessions have limits on requests and tokens instead; SGLang doesn't use it either")
    ]
    session_id: Annotated[str, Meta(min_length=1, max_length=256)] | None = None
    streaming: bool | None = False
    timeout: Annotated[float, Meta(gt=0, le=MAX_SESSION_TIMEOUT)] | None = None


class CloseSessionBody(Struct):
    """``/close_session``."""

    session_id: RequestId


class GenerateBody(Struct):
    """``POST /generate``. Unknown top-level fields are ignored; ``sampling/params.py`` checks ``sampling_params``."""

    text: str | list[str] | None = None
    input_ids: list[TokenId | list[TokenId]] | None = None
    sampling_params: dict[str, Any] | list[dict[str, Any]] | None = None
    rid: RequestId | list[RequestId] | None = None
    stream: bool | None = False
    model: str | None = None
    priority: Int64 | None = None
    extra_key: CacheKey | list[CacheKey | None] | None = None
    cache_salt: CacheKey | list[CacheKey | None] | None = None
    input_embeds: list[list[Component | list[Component]]] | None = None
    lora_path: str | list[str | None] | None = None
    session_params: SessionParams | list[SessionParams | None] | None = None
    return_prompt_token_ids: bool | None = False
    return_logprob: bool | list[bool | None] | None = False
    logprob_start_len: Int64 | list[Int64 | None] | None = -1
    top_logprobs_num: Int64 | list[Int64 | None] | None = 0
    token_ids_logprob: TokenId | list[TokenId | list[TokenId] | None] | None = None
    return_text_in_logprobs: bool | None = False
    return_hidden_states: bool | str | list[bool | str | None] | None = False
    return_routed_experts: bool | None = False
    routed_experts_start_len: Int64 | None = 0
    image_data: UnsupportedMedia = None
    video_data: UnsupportedMedia = None
    audio_data: UnsupportedMedia = None
    custom_logit_processor: LogitProcessor = None
    session_id: Annotated[Any, Ignored("the prefixes of all requests are cached")] = None
    return_sampling_mask: Unsupported = None
    return_indexer_topk: Unsupported = None
    return_entropy: Unsupported = None
    require_reasoning: Unsupported = None
    lora_id: Unsupported = None
    positional_embed_overrides: Unsupported = None
    multi_item_delimiter_indices: Unsupported = None
    max_thinking_tokens: UnsupportedUnlessNull = None
    watermark: Unsupported = None
    return_flat_raw_top_logprobs: Unsupported = None
    return_flat_raw_top_logprobs_b64: Unsupported = None
    modalities: IgnoredMediaOption = None
    mm_hashes: IgnoredMediaOption = None
    mm_content_hashes: IgnoredMediaOption = None
    use_audio_in_video: IgnoredMediaOption = None
    video_config: IgnoredMediaOption = None
    images_config: IgnoredMediaOption = None
    max_dynamic_patch: IgnoredMediaOption = None
    min_dynamic_patch: IgnoredMediaOption = None
    image_max_dynamic_patch: IgnoredMediaOption = None
    video_max_dynamic_patch: IgnoredMediaOption = None
    return_bytes: IgnoredMediaOption = None
    need_wait_for_mm_inputs: IgnoredMediaOption = None
    num_items_assigned: IgnoredMediaOption = None
    encoder_urls: IgnoredMediaOption = None
    log_metrics: IgnoredAccountingField = None
    no_logs: IgnoredAccountingField = None
    background: IgnoredAccountingField = None
    conversation_id: IgnoredAccountingField = None
    custom_labels: IgnoredAccountingField = None
    external_trace_header: IgnoredAccountingField = None
    received_time: IgnoredAccountingField = None
    data_parallel_rank: IgnoredPlacementField = None
    routed_dp_rank: IgnoredPlacementField = None
    bootstrap_host: IgnoredPlacementField = None
    bootstrap_port: IgnoredPlacementField = None
    bootstrap_room: IgnoredPlacementField = None
    bootstrap_pair_key: IgnoredPlacementField = None
    decode_tp_size: IgnoredPlacementField = None
    disagg_prefill_dp_rank: IgnoredPlacementField = None
    kv_router_hint: IgnoredPlacementField = None
    routing_key: IgnoredPlacementField = None
    http_worker_ipc: IgnoredPlacementField = None
