"""Reranking from Python, on :class:`trunkline.core.Engine`: no server needed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from trunkline.core.server.api import Truncation

from .reranker import Limits
from .service import ScoringRequest, Service, new_id

if TYPE_CHECKING:
    from trunkline.core import Engine


def rerank(
    engine: Engine,
    query: str,
    documents: Sequence[str],
    *,
    top_n: int | None = None,
    instruct: str | None = None,
    truncate: Truncation = None,
    model: str = "",
    timeout: float | None = None,
) -> list[dict[str, Any]]:
    """Rank documents by how well they answer ``query``, best first.

    Each record has ``index``, ``score`` (with the checkpoint's activation), ``logit``,
    ``prompt_tokens``, ``cached_tokens``, and ``truncated`` with ``original_tokens`` if the
    document was truncated. ``model`` is by default the first that reranks. RequestError where
    the server would respond with 4xx; TimeoutError when the call takes more than ``timeout`` seconds.
    """
    service = engine.service(Service)
    reranker = service.reranker(model and engine.served(model).name)
    request = ScoringRequest(
        queries=[query] * len(documents),
        documents=list(documents),
        limits=Limits.of(reranker.served, truncate),
        instruct=instruct,
    )
    scored = engine.run(service.score(reranker, request, new_id("rerank")), timeout)
    records: list[dict[str, Any]] = []
    for index, one in enumerate(scored):
        record = {"index": index, "score": one.score, "logit": one.logit, "prompt_tokens": one.prompt_tokens}
        records.append({**record, "cached_tokens": one.cached_tokens, **one.report})
    return sorted(records, key=lambda record: -record["logit"])[:top_n]
