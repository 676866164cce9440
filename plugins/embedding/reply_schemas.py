"""The replies of the routes."""

from __future__ import annotations

from typing import Literal, NotRequired, TypedDict

from trunkline.core.server.api import ItemMeta, TruncationReport, Usage


class EncodeRecord(TypedDict):
    """An input's vector, as ``/encode`` gives it."""

    embedding: list[float]
    meta_info: ItemMeta


class EmbeddingsEntry(TypedDict):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str  # base64 of float32 numbers, little endian
    meta_info: NotRequired[TruncationReport]


class EmbeddingsReply(TypedDict):
    """OpenAI's list of vectors."""

    object: Literal["list"]
    data: list[EmbeddingsEntry]
    model: str
    usage: Usage


# -- Text Embeddings Inference ---------------------------------------------------------------


class TeiPooling(TypedDict):
    pooling: str


class TeiModelType(TypedDict):
    embedding: TeiPooling


class TeiInfo(TypedDict):
    """``/info`` of Text Embeddings Inference."""

    model_id: str
    model_sha: str | None
    model_dtype: str
    model_type: TeiModelType
    max_concurrent_requests: int
    max_input_length: int  # tokens
    max_batch_tokens: int
    max_batch_requests: int | None
    max_client_batch_size: int
    auto_truncate: bool
    tokenization_workers: int
    version: str
    sha: str | None
    docker_label: str | None


# -- Cohere ----------------------------------------------------------------------------------


class CohereVersion(TypedDict):
    version: str


class CohereBilledUnits(TypedDict):
    input_tokens: int


class CohereEmbedMeta(TypedDict):
    api_version: CohereVersion
    billed_units: CohereBilledUnits
    warnings: NotRequired[list[str]]


class CohereFloats(TypedDict):
    """The reply of ``/v1/embed`` to a request without ``embedding_types``."""

    response_type: Literal["embeddings_floats"]
    id: str
    embeddings: list[list[float]]
    texts: list[str]
    meta: CohereEmbedMeta


Floats = list[list[float]]
Integers = list[list[int]]


class CohereVectors(TypedDict, total=False):
    """The vectors by type; those of a type have the order of the texts."""

    float: Floats
    base64: list[str]
    int8: Integers
    uint8: Integers
    binary: Integers
    ubinary: Integers


class CohereByType(TypedDict):
    """The other replies of Cohere's routes."""

    response_type: Literal["embeddings_by_type"]
    id: str
    embeddings: CohereVectors
    texts: list[str]
    meta: CohereEmbedMeta
