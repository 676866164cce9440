"""The request bodies of the routes. Each dialect uses its own fields; unknown fields are ignored."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from trunkline.core.server.api import (
    Ignored,
    IgnoredAccountingField,
    IgnoredMediaOption,
    IgnoredTruncationSide,
    Refused,
    Truncation,
    Unsupported,
    UnsupportedPadding,
    UnsupportedTruncateTokens,
)
from trunkline.core.types import CacheKey, Int64

from .schemas import MAX_LABELS

OwnId = Annotated[Any, Ignored("answers get an id of their own")]
NotRaw = Annotated[Any, Refused("{field} is not supported; raw_scores is.", empty=False)]
OlderName = Annotated[Any, Refused("{field} is not supported; use_activation is.", empty=False)]
OtherPairs = Annotated[Any, Refused("{field} is not supported; text_1 and text_2, or query and items, are.")]
RankFields = Annotated[list[str], Meta(max_length=64)]
Labels = Annotated[list[Int64], Meta(max_length=MAX_LABELS)]


class RerankBody(Struct):
    """All rerank routes."""

    query: str
    documents: list[str | dict[str, Any]] | None = None
    texts: list[str] | None = None  # TEI's name for them
    model: str | None = None
    top_n: Int64 | None = None
    return_documents: bool | None = None
    instruct: str | None = None
    truncate: Truncation = None
    priority: Int64 | None = None
    cache_salt: CacheKey | None = None
    extra_key: CacheKey | None = None
    # Cohere's
    rank_fields: RankFields | None = None
    max_chunks_per_doc: Int64 | None = None
    max_tokens_per_doc: Int64 | None = None
    relevant_spans: Annotated[Any, Refused("{field} is not supported; leave it out.", empty=False)] = None
    # TEI's
    raw_scores: bool | None = None
    return_text: bool | None = None
    truncation_direction: Literal["Left", "Right", "left", "right"] | None = None
    # of others
    top_k: Annotated[Any, Refused("{field} is not supported; top_n is.")] = None
    use_activation: NotRaw = None
    activation: NotRaw = None
    softmax: NotRaw = None
    truncate_prompt_tokens: UnsupportedTruncateTokens = None
    truncation: UnsupportedTruncateTokens = None
    max_doc_length: Annotated[Any, Refused("{field} is not supported; max_tokens_per_doc is.", empty=False)] = None
    max_query_length: Annotated[Any, Refused("{field} is not supported: a query is never cut.", empty=False)] = None
    return_embeddings: Unsupported = None
    padding: UnsupportedPadding = None
    truncation_side: IgnoredTruncationSide = None
    mm_processor_kwargs: IgnoredMediaOption = None
    user: IgnoredAccountingField = None
    rid: OwnId = None
    request_id: OwnId = None


class ScoreBody(Struct):
    """``/score``: pairs ``text_1``/``text_2`` (vLLM's), or ``query``/``items`` (SGLang's)."""

    text_1: str | list[str] | None = None
    text_2: str | list[str] | None = None
    query: str | list[Int64] | None = None
    items: str | list[str | Int64 | list[Int64]] | None = None
    label_token_ids: Labels | None = None
    apply_softmax: bool | None = False
    item_first: bool | None = False
    use_activation: bool | None = None
    model: str | None = None
    instruct: str | None = None
    truncate: Truncation = None
    priority: Int64 | None = None
    cache_salt: CacheKey | None = None
    extra_key: CacheKey | None = None
    activation: OlderName = None
    softmax: OlderName = None
    data_1: OtherPairs = None
    data_2: OtherPairs = None
    queries: OtherPairs = None
    documents: OtherPairs = None
    query_embed_overrides: Unsupported = None
    item_embed_overrides: Unsupported = None
    return_pooled_hidden_states: Unsupported = None
    truncate_prompt_tokens: UnsupportedTruncateTokens = None
    padding: UnsupportedPadding = None
    truncation_side: IgnoredTruncationSide = None
    mm_processor_kwargs: IgnoredMediaOption = None
    embed_override_token_id: Annotated[Any, Ignored("it matters only with overrides, which are refused")] = None
    user: IgnoredAccountingField = None
    rid: OwnId = None
    request_id: OwnId = None
