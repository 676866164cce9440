"""Reranking from Python, on :class:`trunkline.core.Engine`: no server needed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from trunkline.core.server.api import Truncation

from .reranker import Limits
from .service import Job, Service, new_id

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
    """Documents by how well they answer ``query``, best first, all in one batch.

    Each record has ``index``, ``score`` (what the checkpoint makes of its logit), ``logit``,
    ``prompt_tokens``, ``cached_tokens``, and ``truncated`` with ``original_tokens`` where the
    document was cut. ``model`` is by default the first that reranks. Raises RequestError for what
    the server would answer 4xx, TimeoutError when all of it takes more than ``timeout`` seconds.
    """
    service = engine.service(Service)
    reranker = service.reranker(model and engine.served(model).name)
    job = Job(
        queries=[query] * len(documents),
        documents=list(documents),
        limits=Limits.of(reranker.served, truncate),
        instruct=instruct,
    )
    scored = engine.run(service.score(reranker, job, new_id("rerank")), timeout)
    records: list[dict[str, Any]] = []
    for index, one in enumerate(scored):
        record = {"index": index, "score": one.score, "logit": one.logit, "prompt_tokens": one.prompt_tokens}
        records.append({**record, "cached_tokens": one.cached_tokens, **one.report})
    return sorted(records, key=lambda record: -record["logit"])[:top_n]
