"""What the routes take."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from trunkline.core.server.api import Truncation

from .schemas import Dimensions

INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1

Int64 = Annotated[int, Meta(ge=INT64_MIN, le=INT64_MAX)]
# Bounded, because they are copied for every item of a batch.
RequestId = Annotated[str, Meta(max_length=256)]
CacheKey = Annotated[str, Meta(max_length=1024)]
TokenId = Annotated[int, Meta(ge=INT64_MIN, le=INT64_MAX)]  # the service checks the vocabulary and names it


class EncodeBody(Struct):
    """``POST /encode``. Unknown top-level fields are ignored.

    Fields typed ``Any`` at the end belong to what isn't served: only their neutral values pass.
    """

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
    is_cross_encoder_request: Any = None
    input_embeds: Any = None
    image_data: Any = None
    video_data: Any = None
    audio_data: Any = None
    lora_path: Any = None
    return_pooled_hidden_states: Any = None
    return_prompt_token_ids: Any = None


class EmbeddingsBody(Struct):
    """``POST /v1/embeddings``."""

    input: str | list[str | TokenId | list[TokenId]]
    model: str | None = None
    encoding_format: str | None = None
    dimensions: Dimensions | None = None
    truncate: Truncation = None
    prompt_name: str | None = None
    prompt: str | None = None
    priority: Int64 | None = None
    cache_salt: CacheKey | None = None


class EmbedBody(Struct):
    """``POST /embed``, as Text Embeddings Inference has it."""

    inputs: str | list[str]
    model: str | None = None
    truncate: Truncation = None
    truncation_direction: Literal["Left", "Right", "left", "right"] | None = None
    normalize: bool | None = True
    dimensions: Dimensions | None = None
    prompt_name: str | None = None
