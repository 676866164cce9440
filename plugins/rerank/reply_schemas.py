"""The replies of the routes, by dialect."""

from __future__ import annotations

from typing import Any, Literal, NotRequired, TypedDict

from msgspec import Struct

from trunkline.core.server.api import ItemMeta, TruncationReport, Usage

from .settings import Format


class FormatQuery(Struct):
    """Query parameters of the rerank routes."""

    format: Format | None = None


class SglangEntry(TypedDict):
    """A document in SGLang's bare list."""

    score: float
    index: int
    meta_info: ItemMeta
    document: NotRequired[str]


class TeiEntry(TruncationReport):
    """A document in the bare list of Text Embeddings Inference."""

    index: int
    score: float
    text: NotRequired[str]


class Result(TruncationReport):
    """A document in the object of Jina, vLLM and Cohere."""

    index: int
    relevance_score: float
    document: NotRequired[dict[str, Any]]


class JinaReply(TypedDict):
    """The object of Jina and vLLM."""

    id: str
    model: str
    results: list[Result]
    usage: Usage


class ApiVersion(TypedDict):
    version: str


class BilledUnits(TypedDict):
    search_units: int


class CohereTokens(TypedDict):
    input_tokens: int
    output_tokens: int


class CohereMeta(TypedDict):
    api_version: ApiVersion
    billed_units: BilledUnits
    tokens: CohereTokens
    cached_tokens: int
    warnings: NotRequired[list[str]]


class CohereReply(TypedDict):
    """Cohere's object."""

    id: str
    results: list[Result]
    meta: CohereMeta


RANKING = list[SglangEntry], list[TeiEntry], JinaReply, CohereReply
"""Replies of every rerank route: ``?format=`` can choose any dialect."""


class PairScore(TruncationReport):
    index: int
    object: Literal["score"]
    score: float


class PairScores(TypedDict):
    """vLLM's list of scores of pairs."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[PairScore]
    usage: Usage


class Scoring(TypedDict):
    """SGLang's scores of items, one list for each."""

    scores: list[list[float]]
    model: str
    usage: Usage
    object: Literal["scoring"]
    meta_info: list[ItemMeta]
