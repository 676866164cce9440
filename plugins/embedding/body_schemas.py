"""What the routes take."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Struct

from trunkline.core.server.api import Accounting, Ignored, Later, Media, MediaOption, Placement, Refused, Truncation
from trunkline.core.types import CacheKey, Int64, RequestId, TokenId

from .schemas import Dimensions

NamedPrompt = Annotated[Any, Refused("{field} is not supported; prompt_name or prompt says what a text is for.")]
NumberFormat = Annotated[
    Any, Refused("{field} is not supported; encoding_format is float or base64.", ("float", "float32"))
]
OverridesOption = Annotated[Any, Ignored("it matters only with embed_overrides, which are refused")]
MessagesOption = Annotated[Any, Ignored("it matters only with messages, which are refused")]


class EncodeBody(Struct):
    """``POST /encode``. Unknown top-level fields are ignored."""

    text: str | list[str | list[str]] | None = None
    input_ids: list[TokenId | list[TokenId]] | None = None
    rid: RequestId | list[RequestId] | None = None
    model: str | None = None
    priority: Int64 | None = None
    extra_key: CacheKey | None = None
    cache_salt: CacheKey | None = None
    dimensions: Dimensions | None = None
    normalize: bool | None = None
    truncate: Truncation = None
    prompt_name: str | None = None
    prompt: str | None = None
    is_cross_encoder_request: Annotated[Any, Refused("{field} is not supported; see /v1/rerank.")] = None
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
    sampling_params: Annotated[Any, Ignored("a vector is not sampled")] = None
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


class EmbeddingsBody(Struct):
    """``POST /v1/embeddings``: OpenAI's request, with fields of SGLang, vLLM and Jina. Unknown fields are ignored."""

    input: str | list[str | TokenId | list[TokenId]]
    model: str | None = None
    encoding_format: str | None = None
    dimensions: Dimensions | None = None
    truncate: Truncation = None
    prompt_name: str | None = None
    prompt: str | None = None
    normalize: bool | None = None
    normalized: bool | None = None  # Jina's name for it
    rid: RequestId | list[RequestId] | None = None
    priority: Int64 | None = None
    cache_salt: CacheKey | None = None
    extra_key: CacheKey | None = None
    input_type: NamedPrompt = None
    task: NamedPrompt = None
    messages: Annotated[Any, Refused("{field} is not supported; send texts as input.")] = None
    chat_template: Annotated[Any, Refused("{field} can't be sent: templates come from the server's operator.")] = None
    embedding_type: NumberFormat = None
    encoding_type: NumberFormat = None
    embed_dtype: NumberFormat = None
    output_dtype: NumberFormat = None
    endianness: Annotated[Any, Refused("{field} is not supported; base64 is little endian.", ("little", "native"))] = (
        None
    )
    truncate_prompt_tokens: Annotated[Any, Refused("{field} is not supported; truncate is.", empty=False)] = None
    add_special_tokens: Annotated[Any, Refused("{field} is not supported; send token ids.", (True,), empty=False)] = (
        None
    )
    use_activation: Annotated[Any, Refused("{field} is not supported; normalize is.", empty=False)] = None
    late_chunking: Later = None
    return_multivector: Annotated[Any, Refused("{field} is not supported: each text has one vector.")] = None
    padding: Annotated[Any, Refused("{field} is not supported: inputs are never padded.", ("do_not_pad",))] = None
    modality: Annotated[Any, Refused("{field} is not supported: this server takes text only.", ("text",))] = None
    lora_path: Later = None
    embed_overrides: Later = None
    embed_override_token_id: OverridesOption = None
    truncation_side: Annotated[Any, Ignored("it matters only with truncate_prompt_tokens, which is refused")] = None
    add_generation_prompt: MessagesOption = None
    continue_final_message: MessagesOption = None
    chat_template_kwargs: MessagesOption = None
    mm_processor_kwargs: MediaOption = None
    media_io_kwargs: MediaOption = None
    user: Accounting = None
    request_id: Annotated[Any, Ignored("rid is the request's id")] = None


class EmbedBody(Struct):
    """``POST /embed``, as Text Embeddings Inference has it."""

    inputs: str | list[str]
    model: str | None = None
    truncate: Truncation = None
    truncation_direction: Literal["Left", "Right", "left", "right"] | None = None
    normalize: bool | None = True
    dimensions: Dimensions | None = None
    prompt_name: str | None = None
