"""Bodies of routes with one result per input, as other servers define them; plugins' bodies inherit from these."""

from __future__ import annotations

from typing import Annotated, Any

from msgspec import Struct

from trunkline.core.client.truncate import Truncation
from trunkline.core.types import CacheKey, Int64, RequestId, TokenId

from .fields import (
    Ignored,
    IgnoredAccountingField,
    IgnoredMediaOption,
    IgnoredMessagesOption,
    IgnoredOverridesOption,
    IgnoredPlacementField,
    IgnoredTruncationSide,
    Refused,
    Unsupported,
    UnsupportedMedia,
    UnsupportedPadding,
    UnsupportedTruncateTokens,
)


class SGLangPoolingBody(Struct):
    """SGLang's request. ``text`` may hold pairs of texts."""

    text: str | list[str | list[str]] | None = None
    input_ids: list[TokenId | list[TokenId]] | None = None
    rid: RequestId | list[RequestId] | None = None
    model: str | None = None
    priority: Int64 | None = None
    extra_key: CacheKey | None = None
    cache_salt: CacheKey | None = None
    truncate: Truncation = None
    input_embeds: Unsupported = None
    image_data: UnsupportedMedia = None
    video_data: UnsupportedMedia = None
    audio_data: UnsupportedMedia = None
    lora_path: Unsupported = None
    lora_id: Unsupported = None
    embed_overrides: Unsupported = None
    positional_embed_overrides: Unsupported = None
    multi_item_delimiter_indices: Unsupported = None
    return_pooled_hidden_states: Unsupported = None
    return_prompt_token_ids: Unsupported = None
    modalities: IgnoredMediaOption = None
    log_metrics: IgnoredAccountingField = None
    data_parallel_rank: IgnoredPlacementField = None
    routed_dp_rank: IgnoredPlacementField = None
    embed_override_token_id: IgnoredOverridesOption = None
    background: IgnoredAccountingField = None
    external_trace_header: IgnoredAccountingField = None
    received_time: IgnoredAccountingField = None
    routing_key: IgnoredPlacementField = None
    http_worker_ipc: IgnoredPlacementField = None


class OpenAIPoolingBody(Struct):
    """OpenAI's request, with fields of vLLM."""

    input: str | list[str | TokenId | list[TokenId]]
    model: str | None = None
    truncate: Truncation = None
    rid: RequestId | list[RequestId] | None = None
    priority: Int64 | None = None
    cache_salt: CacheKey | None = None
    extra_key: CacheKey | None = None
    messages: Annotated[Any, Refused("{field} is not supported; send texts as input.")] = None
    chat_template: Annotated[Any, Refused("{field} can't be sent: templates come from the server's operator.")] = None
    truncate_prompt_tokens: UnsupportedTruncateTokens = None
    add_special_tokens: Annotated[Any, Refused("{field} is not supported; send token ids.", (True,), empty=False)] = (
        None
    )
    padding: UnsupportedPadding = None
    truncation_side: IgnoredTruncationSide = None
    add_generation_prompt: IgnoredMessagesOption = None
    continue_final_message: IgnoredMessagesOption = None
    chat_template_kwargs: IgnoredMessagesOption = None
    mm_processor_kwargs: IgnoredMediaOption = None
    media_io_kwargs: IgnoredMediaOption = None
    user: IgnoredAccountingField = None
    request_id: Annotated[Any, Ignored("rid is the request's id")] = None
