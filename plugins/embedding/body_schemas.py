"""The request bodies of the routes."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from trunkline.core.server.api import (
    Ignored,
    IgnoredOverridesOption,
    OpenAIPoolingBody,
    Refused,
    SGLangPoolingBody,
    Truncation,
    Unsupported,
    UnsupportedMedia,
)
from trunkline.core.types import TokenId

from .schemas import MAX_TOKENS, Dimensions

NamedPrompt = Annotated[Any, Refused("{field} is not supported; prompt_name or prompt says what a text is for.")]
NumberFormat = Annotated[
    Any, Refused("{field} is not supported; encoding_format is float or base64.", ("float", "float32"))
]


class EncodeBody(SGLangPoolingBody):
    """``POST /encode``. Unknown top-level fields are ignored."""

    dimensions: Dimensions | None = None
    normalize: bool | None = None
    prompt_name: str | None = None
    prompt: str | None = None
    is_cross_encoder_request: Annotated[Any, Refused("{field} is not supported; see /v1/rerank.")] = None
    sampling_params: Annotated[Any, Ignored("a vector is not sampled")] = None


class EmbeddingsBody(OpenAIPoolingBody):
    """``POST /v1/embeddings``: OpenAI's request, with fields of SGLang, vLLM and Jina. Unknown fields are ignored."""

    encoding_format: str | None = None
    dimensions: Dimensions | None = None
    prompt_name: str | None = None
    prompt: str | None = None
    normalize: bool | None = None
    normalized: bool | None = None  # Jina's name for it
    input_type: NamedPrompt = None
    task: NamedPrompt = None
    embedding_type: NumberFormat = None
    encoding_type: NumberFormat = None
    embed_dtype: NumberFormat = None
    output_dtype: NumberFormat = None
    endianness: Annotated[Any, Refused("{field} is not supported; base64 is little endian.", ("little", "native"))] = (
        None
    )
    use_activation: Annotated[Any, Refused("{field} is not supported; normalize is.", empty=False)] = None
    late_chunking: Unsupported = None
    return_multivector: Annotated[Any, Refused("{field} is not supported: each text has one vector.")] = None
    modality: Annotated[Any, Refused("{field} is not supported: this server takes text only.", ("text",))] = None
    lora_path: Unsupported = None
    embed_overrides: Unsupported = None
    embed_override_token_id: IgnoredOverridesOption = None


class EmbedBody(Struct):
    """``POST /embed`` and ``POST /``, as Text Embeddings Inference has them."""

    inputs: str | list[str | TokenId | list[TokenId]]
    model: str | None = None
    truncate: Truncation = None
    truncation_direction: Literal["Left", "Right", "left", "right"] | None = None
    normalize: bool | None = True
    dimensions: Dimensions | None = None
    prompt_name: str | None = None
    encoding_format: Annotated[
        Any, Refused("{field} is not supported here: the reply is a list of floats. See /v1/embeddings.", ("float",))
    ] = None


class DecodeBody(Struct):
    """``POST /decode``, as Text Embeddings Inference has it."""

    ids: list[TokenId | list[TokenId]]
    skip_special_tokens: bool | None = True
    model: str | None = None


class CohereContent(Struct):
    """A part of an input of Cohere's request."""

    type: str
    text: str | None = None
    image_url: UnsupportedMedia = None


class CohereInput(Struct):
    """An input of Cohere's request; the texts of its parts are joined by line feeds."""

    content: list[CohereContent]


class CohereEmbedBody(Struct):
    """``POST /v1/embed`` and ``POST /v2/embed``: Cohere's request. Unknown fields are ignored."""

    texts: list[str] | None = None
    inputs: list[CohereInput] | None = None
    model: str | None = None
    input_type: str | None = None
    embedding_types: list[str] | None = None
    truncate: Truncation = None
    output_dimension: Dimensions | None = None
    max_tokens: Annotated[int, Meta(ge=1, le=MAX_TOKENS)] | None = None
    priority: Annotated[int, Meta(ge=0, le=999)] | None = None
    images: UnsupportedMedia = None
