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
