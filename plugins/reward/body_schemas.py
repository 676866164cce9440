"""What the routes take."""

from __future__ import annotations

from typing import Annotated, Any

from msgspec import Struct

from trunkline.core.server.api import Accounting, Ignored, Later, Media, MediaOption, Placement, Refused, Truncation
from trunkline.core.types import CacheKey, Int64, RequestId, TokenId

OverridesOption = Annotated[Any, Ignored("it matters only with embed_overrides, which are refused")]
MessagesOption = Annotated[Any, Ignored("it matters only with messages, which are refused")]


class ClassifyBody(Struct):
    """``POST /classify``, the request of SGLang's /encode. Unknown top-level fields are ignored.

    ``text`` may hold pairs of texts, joined as the model's tokenizer does it.
    """

    text: str | list[str | list[str]] | None = None
    input_ids: list[TokenId | list[TokenId]] | None = None
    rid: RequestId | list[RequestId] | None = None
    model: str | None = None
    priority: Int64 | None = None
    extra_key: CacheKey | None = None
    cache_salt: CacheKey | None = None
    truncate: Truncation = None
    dimensions: Annotated[Any, Refused("{field} is for /encode; scores aren't cut.")] = None
    input_embeds: Later = None
    image_data: Media = None
    video_data: Media = None
    audio_data: Media = None
    lora_path: Later = None
    lora_id: Later = None
    embed_overrides: Later = None
    positional_embed_overrides: Later = None
    multi_item_delimiter_indices: Later = None
    return_pooled_hidden_states: Later = None
    return_prompt_token_ids: Later = None
    is_cross_encoder_request: Annotated[Any, Ignored("pairs are told from single texts without it")] = None
    sampling_params: Annotated[Any, Ignored("a score is not sampled")] = None
    modalities: MediaOption = None
    log_metrics: Accounting = None
    data_parallel_rank: Placement = None
    routed_dp_rank: Placement = None
    embed_override_token_id: OverridesOption = None
    background: Accounting = None
    external_trace_header: Accounting = None
    received_time: Accounting = None
    routing_key: Placement = None
    http_worker_ipc: Placement = None


class OpenAIClassifyBody(Struct):
    """``POST /v1/classify``, as vLLM has it.

    ``use_activation`` false gives the scores themselves in ``probs`` (``activation`` is vLLM's
    older name of it).
    """

    input: str | list[str | TokenId | list[TokenId]]
    model: str | None = None
    truncate: Truncation = None
    use_activation: bool | None = None
    activation: bool | None = None
    rid: RequestId | list[RequestId] | None = None
    priority: Int64 | None = None
    cache_salt: CacheKey | None = None
    extra_key: CacheKey | None = None
    messages: Annotated[Any, Refused("{field} is not supported; send texts as input.")] = None
    truncate_prompt_tokens: Annotated[Any, Refused("{field} is not supported; truncate is.", empty=False)] = None
    add_special_tokens: Annotated[Any, Refused("{field} is not supported; send token ids.", (True,), empty=False)] = (
        None
    )
    softmax: Annotated[Any, Refused("{field} is not supported; use_activation is.", empty=False)] = None
    padding: Annotated[Any, Refused("{field} is not supported: inputs are never padded.", ("do_not_pad",))] = None
    chat_template: Annotated[Any, Refused("{field} can't be sent: templates come from the server's operator.")] = None
    truncation_side: Annotated[Any, Ignored("it matters only with truncate_prompt_tokens, which is refused")] = None
    add_generation_prompt: MessagesOption = None
    continue_final_message: MessagesOption = None
    chat_template_kwargs: MessagesOption = None
    mm_processor_kwargs: MediaOption = None
    media_io_kwargs: MediaOption = None
    user: Accounting = None
    request_id: Annotated[Any, Ignored("rid is the request's id")] = None
