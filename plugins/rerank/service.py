"""From checked pairs of texts to scores; the routes of all dialects go through here."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct

from trunkline.core.errors import RequestError
from trunkline.core.server.api import (
    ItemMeta,
    PerModel,
    PreparedInput,
    TruncationReport,
    Usage,
    check_batch,
    item_meta,
    new_rid,
    run_all,
    run_in_slices,
    token_usage,
)
from trunkline.core.types import EngineClient, Reply, ServedModel, Settings

from .reranker import DOCUMENTS, QUERY, Field, Limits, Reranker
from .schemas import RerankParams
from .settings import GROUP, TASK, RerankSettings


class Job(Struct, frozen=True, kw_only=True):
    """Pairs of texts that are scored together. ``fields``: those that the queries and the documents came in."""

    queries: list[str]
    documents: list[str]
    limits: Limits
    instruct: str | None = None
    priority: int = 0
    salt: bytes = b""
    fields: tuple[Field, Field] = (QUERY, DOCUMENTS)


class Scored(Struct, frozen=True):
    """A pair's result. ``logit`` is the raw score, ``score`` what the checkpoint makes of it."""

    logit: float
    score: float
    prompt_tokens: int
    cached_tokens: int
    report: TruncationReport  # of a document that was cut, see PreparedInput.report
    meta: ItemMeta


class Service:
    """The front's part of reranking."""

    def __init__(self, engine: EngineClient, settings: Settings) -> None:
        self.engine = engine
        self.max_batch: int = settings["server"].max_batch_size
        self._rerankers = PerModel(self._reranker)

    def reranker(self, model: str | None) -> Reranker:
        """The reranker that a request means. RequestError when its model can't."""
        return self._rerankers.get(self.engine.choose(TASK, model))

    def _reranker(self, served: ServedModel) -> Reranker:
        settings: RerankSettings = self.engine.settings(served.name)[GROUP]
        return Reranker(served, self.engine.tokenizer(served.name), settings)

    async def score(self, reranker: Reranker, job: Job, rid: str) -> list[Scored]:
        """Score all pairs, in their order. Raises the first error; when the caller is cancelled all is."""
        field = next((field for field in reversed(job.fields) if not field.single), job.fields[1])
        check_batch(len(job.documents), self.max_batch, field.name)
        await self.engine.off_loop(reranker.prepare)
        pieces = await self._prompts(reranker, job)
        replies = await self.run(
            reranker, pieces, reranker.params, rid, priority=job.priority, salt=job.salt, field=job.fields[1]
        )
        return [self._scored(reranker, own, some) for own, some in zip(pieces, replies, strict=True)]

    async def _prompts(self, reranker: Reranker, job: Job) -> list[list[PreparedInput]]:
        """Prompts of all pairs. RequestError when documents fall into more chunks than a request may have items."""
        chunks = 0

        def prompts(start: int, end: int) -> list[list[PreparedInput]]:
            nonlocal chunks
            pieces = reranker.items(
                job.queries[start:end],
                job.documents[start:end],
                job.limits,
                instruct=job.instruct,
                first=start,
                fields=job.fields,
            )
            chunks += sum(map(len, pieces))
            if chunks > self.max_batch:
                raise RequestError(
                    f"The first {end} documents fall into {chunks} chunks; at most {self.max_batch} are allowed. "
                    "Lower max_chunks_per_doc, send fewer documents, or raise --max-batch-size.",
                    param="max_chunks_per_doc",
                )
            return pieces

        return await run_in_slices(self.engine, lengths(job.queries, job.documents, job.instruct), prompts)

    async def run(
        self,
        reranker: Reranker,
        pieces: Sequence[Sequence[PreparedInput]],
        params: RerankParams,
        rid: str,
        *,
        priority: int = 0,
        salt: bytes = b"",
        field: Field = DOCUMENTS,
    ) -> list[list[Reply]]:
        """Run every piece at once; replies grouped as ``pieces`` are. Ids of requests begin with ``rid``."""
        flat = [item for items in pieces for item in items]
        rids = [rid] if len(flat) == 1 else [f"{rid}_{index}" for index in range(len(flat))]
        replies = iter(
            await run_all(
                self.engine,
                reranker.served,
                TASK,
                flat,
                params,
                rids,
                priority=priority,
                salt=salt,
                single=field.single or len(flat) > len(pieces),  # the index would be a chunk's
                field=field.name,
            )
        )
        return [[next(replies) for _ in items] for items in pieces]

    @staticmethod
    def _scored(reranker: Reranker, items: Sequence[PreparedInput], replies: Sequence[Reply]) -> Scored:
        """The best of a document's chunks, with the tokens of all."""
        logits = [reranker.logit(reply.data) for reply in replies]
        best = max(range(len(logits)), key=logits.__getitem__)
        meta = item_meta(replies[best], reranker.served, items[best], cached=True)
        tokens, cached = sum(len(item.ids) for item in items), sum(reply.cached_tokens for reply in replies)
        meta |= {"prompt_tokens": tokens, "cached_tokens": cached}
        return Scored(logits[best], reranker.score(logits[best]), tokens, cached, items[best].report, meta)


def lengths(queries: Sequence[str], documents: Sequence[str], instruct: str | None = None) -> list[int]:
    """Characters of each pair, with the instruction that each gets."""
    more = len(instruct or "")
    return [len(query) + len(document) + more for query, document in zip(queries, documents, strict=True)]


def check_query(query: str) -> None:
    """RequestError as SGLang words it."""
    if not query:
        raise RequestError("Query cannot be empty", param="query")
    if not query.strip():
        raise RequestError("Query cannot be empty or whitespace only", param="query")


def check_documents(documents: Sequence[str]) -> None:
    """RequestError as SGLang words it."""
    if not documents:
        raise RequestError("Documents cannot be empty", param="documents")
    for index, document in enumerate(documents):
        if not document:
            raise RequestError("Each document must be a non-empty string", param=f"documents[{index}]")
        if not document.strip():
            raise RequestError("Each document cannot be empty or whitespace only", param=f"documents[{index}]")


def check_texts(texts: Sequence[str], field: Field) -> None:
    """As :func:`check_documents`, for the fields of other dialects."""
    if not texts:
        raise RequestError(f"{field.name} cannot be empty", param=field.name)
    for index, text in enumerate(texts):
        place = field.name if field.single else f"{field.name}[{index}]"
        if not text.strip():
            raise RequestError(f"{place} cannot be empty{' or whitespace only' if text else ''}", param=place)


def usage(scored: Sequence[Scored]) -> Usage:
    """OpenAI's object for the tokens of all pairs."""
    return token_usage(sum(one.prompt_tokens for one in scored), cached=sum(one.cached_tokens for one in scored))


def new_id(kind: str) -> str:
    """An id for an answer; the engine's requests get it with an index."""
    return f"{kind}-{new_rid()}"
