"""Renders a ranking in the formats of different APIs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from msgspec import Struct

from .detect import sigmoid
from .reply_schemas import CohereMeta, CohereReply, JinaReply, Result, SglangEntry, TeiEntry
from .service import ScoredPair, usage

SEARCH_UNIT = 100  # documents that Cohere counts as one search


class Ranking(Struct, frozen=True, kw_only=True):
    """``order``: indices into ``scored`` and ``documents``, best first, at most ``top_n`` of them."""

    id: str
    model: str
    scored: list[ScoredPair]
    documents: list[str | dict[str, Any]]  # as the client sent them
    texts: list[str]  # their texts that were scored
    order: list[int]
    with_documents: bool
    raw_scores: bool = False
    version: str = "1"  # of Cohere's API


def ranked(scored: list[ScoredPair], top_n: int | None) -> list[int]:
    """Indices, best first; ties in the order of the request."""
    order = sorted(range(len(scored)), key=lambda index: -scored[index].logit)
    return order[:top_n]


def sglang(ranking: Ranking) -> list[SglangEntry]:
    """A bare list; the score has the checkpoint's activation, usually none."""
    answer = []
    for index in ranking.order:
        one = ranking.scored[index]
        score = one.logit if ranking.raw_scores else one.score
        entry: SglangEntry = {"score": score, "index": index, "meta_info": one.meta}
        if ranking.with_documents:
            entry["document"] = ranking.texts[index]
        answer.append(entry)
    return answer


def tei(ranking: Ranking) -> list[TeiEntry]:
    """Text Embeddings Inference's bare list: probabilities, or raw logits with ``raw_scores``."""
    answer = []
    for index in ranking.order:
        one = ranking.scored[index]
        entry: TeiEntry = {"index": index, "score": relevance(ranking, one)}
        entry = {**entry, **one.report}
        if ranking.with_documents:
            entry["text"] = ranking.texts[index]
        answer.append(entry)
    return answer


def jina(ranking: Ranking) -> JinaReply:
    """The object of Jina, Infinity and vLLM; scores are in [0, 1]."""
    return {
        "id": ranking.id,
        "model": ranking.model,
        "results": _results(ranking),
        "usage": usage(ranking.scored),
    }


def cohere(ranking: Ranking) -> CohereReply:
    """Cohere's object; scores are in [0, 1]. Truncated documents are listed in ``meta.warnings``."""
    counts = usage(ranking.scored)
    meta: CohereMeta = {
        "api_version": {"version": ranking.version},
        "billed_units": {"search_units": math.ceil(len(ranking.scored) / SEARCH_UNIT)},
        "tokens": {"input_tokens": counts["prompt_tokens"], "output_tokens": 0},
        "cached_tokens": counts["prompt_tokens_details"]["cached_tokens"],
    }
    warnings = [
        f"documents[{index}] was truncated: of the pair's {one.report.get('original_tokens', 'many more')} tokens "
        f"{one.prompt_tokens} were used."
        for index, one in enumerate(ranking.scored)
        if one.report
    ]
    if warnings:
        meta["warnings"] = warnings
    return {"id": ranking.id, "results": _results(ranking, cuts=False), "meta": meta}


def _results(ranking: Ranking, *, cuts: bool = True) -> list[Result]:
    results: list[Result] = []
    for index in ranking.order:
        one = ranking.scored[index]
        entry: Result = {"index": index, "relevance_score": relevance(ranking, one)}
        if cuts:
            entry = {**entry, **one.report}
        if ranking.with_documents:
            document = ranking.documents[index]
            entry["document"] = {"text": document} if isinstance(document, str) else document
        results.append(entry)
    return results


def relevance(ranking: Ranking, one: ScoredPair) -> float:
    """The sigmoid of the logit, whatever the checkpoint's activation, so that thresholds mean the same for all models;
    with ``raw_scores``, the logit."""
    return one.logit if ranking.raw_scores else sigmoid(one.logit)


DIALECTS: dict[str, Callable[[Ranking], Any]] = {"sglang": sglang, "jina": jina, "cohere": cohere, "tei": tei}
WITH_DOCUMENTS = {"sglang": True, "jina": True, "cohere": False, "tei": False}
"""Whether documents come back when the request doesn't say."""
