"""Reranking from Python, on :class:`trunkline.core.Engine`: no server needed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from trunkline.core.server.api import Truncation, choose

from .reranker import Limits, Reranker
from .settings import TASK, RerankSettings

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
    settings: RerankSettings | None = None,
    model: str = "",
    timeout: float | None = None,
) -> list[dict[str, Any]]:
    """Documents by how well they answer ``query``, best first, all in one batch.

    Each record has ``index``, ``score`` (what the checkpoint makes of its logit), ``logit``,
    ``prompt_tokens``, ``cached_tokens``, and ``truncated`` with ``original_tokens`` where the
    document was cut. ``model`` is by default the first that reranks. Raises RequestError for what
    the server would answer 4xx, TimeoutError when a pair takes more than ``timeout`` seconds.
    """
    served = choose(engine.models, TASK, model and engine.served(model).name)
    reranker = Reranker(served, engine.tokenizer(served.name), settings or RerankSettings())
    pieces = reranker.items([query] * len(documents), documents, Limits.of(served, truncate), instruct=instruct)
    items = [items[0] for items in pieces]  # without chunks a pair is one item
    tickets = [
        engine.submit(TASK, item.ids, reranker.params, model=served.name, second_at=item.second_at) for item in items
    ]
    engine.wait_for(tickets, timeout)
    records: list[dict[str, Any]] = []
    for index, (ticket, item) in enumerate(zip(tickets, items, strict=True)):
        logit = reranker.logit(ticket.data)
        record = {"index": index, "score": reranker.score(logit), "logit": logit, "prompt_tokens": len(item.ids)}
        record["cached_tokens"] = ticket.cached_tokens
        records.append({**record, **item.report})
    return sorted(records, key=lambda record: -record["logit"])[:top_n]
