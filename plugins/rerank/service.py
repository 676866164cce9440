"""Scores pairs of texts; used by the routes of all dialects and from Python."""

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
    check_batch_size,
    item_meta,
    new_rid,
    run_in_slices,
    submit_and_wait,
    token_usage,
)
from trunkline.core.types import EngineClient, Reply, ServedModel, Settings

from .reranker import DOCUMENTS, QUERY, Field, Limits, Reranker
from .schemas import RerankParams
from .settings import GROUP, TASK, RerankSettings


class ScoringRequest(Struct, frozen=True, kw_only=True):
    """Pairs of texts to score, and options. ``fields``: the client's fields of the queries and the documents."""

    queries: list[str]
    documents: list[str]
    limits: Limits
    instruct: str | None = None
    priority: int = 0
    salt: bytes = b""
    fields: tuple[Field, Field] = (QUERY, DOCUMENTS)


class ScoredPair(Struct, frozen=True):
    """A pair's result. ``logit`` is the raw score; ``score`` has the checkpoint's activation."""

    logit: float
    score: float
    prompt_tokens: int
    cached_tokens: int
    report: TruncationReport  # see PreparedInput.report
    meta: ItemMeta


class Service:
    """The rerank task in the front."""

    def __init__(self, engine: EngineClient, settings: Settings) -> None:
        self.engine = engine
        self.max_batch: int = settings["server"].max_batch_size
        self._rerankers = PerModel(self._reranker)

    def reranker(self, model: str | None) -> Reranker:
        """The reranker of the model that a request names. RequestError when it can't rerank."""
        return self._rerankers.get(self.engine.choose(TASK, model))

    def _reranker(self, served: ServedModel) -> Reranker:
        settings: RerankSettings = self.engine.settings(served.name)[GROUP]
        return Reranker(served, self.engine.tokenizer(served.name), settings)

    async def score(self, reranker: Reranker, request: ScoringRequest, rid: str) -> list[ScoredPair]:
        """Score all pairs, in their order. Raises the first error; if the caller is cancelled, all are."""
        field = next((field for field in reversed(request.fields) if not field.single), request.fields[1])
        check_batch_size(len(request.documents), self.max_batch, field.name)
        await self.engine.off_loop(reranker.prepare)
        pieces = await self._prompts(reranker, request)
        replies = await self.run(
            reranker,
            pieces,
            reranker.params,
            rid,
            priority=request.priority,
            salt=request.salt,
            field=request.fields[1],
        )
        return [self._scored(reranker, own, some) for own, some in zip(pieces, replies, strict=True)]

    async def _prompts(self, reranker: Reranker, request: ScoringRequest) -> list[list[PreparedInput]]:
        """The prompts of all pairs. RequestError when there are more chunks than ``--max-batch-size``."""
        chunks = 0

        def prompts(start: int, end: int) -> list[list[PreparedInput]]:
            nonlocal chunks
            pieces = reranker.items(
                request.queries[start:end],
                request.documents[start:end],
                request.limits,
                instruct=request.instruct,
                first=start,
                fields=request.fields,
            )
            chunks += sum(map(len, pieces))
            if chunks > self.max_batch:
                raise RequestError(
                    f"The first {end} documents fall into {chunks} chunks; at most {self.max_batch} are allowed. "
                    "Lower max_chunks_per_doc, send fewer documents, or raise --max-batch-size.",
                    param="max_chunks_per_doc",
                )
            return pieces

        return await run_in_slices(self.engine, lengths(request.queries, request.documents, request.instruct), prompts)

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
        """Run all pieces together; the replies are grouped like ``pieces``. Ids of requests begin with ``rid``."""
        flat = [item for items in pieces for item in items]
        rids = [rid] if len(flat) == 1 else [f"{rid}_{index}" for index in range(len(flat))]
        replies = iter(
            await submit_and_wait(
                self.engine,
                reranker.served,
                TASK,
                flat,
                params,
                rids,
                priority=priority,
                salt=salt,
                single=field.single or len(flat) > len(pieces),  # with chunks, the index isn't a document's
                field=field.name,
            )
        )
        return [[next(replies) for _ in items] for items in pieces]

    @staticmethod
    def _scored(reranker: Reranker, items: Sequence[PreparedInput], replies: Sequence[Reply]) -> ScoredPair:
        """The best score of a document's chunks, with the number of tokens of all chunks."""
        logits = [reranker.logit(reply.data) for reply in replies]
        best = max(range(len(logits)), key=logits.__getitem__)
        meta = item_meta(replies[best], reranker.served, items[best], cached=True)
        tokens, cached = sum(len(item.ids) for item in items), sum(reply.cached_tokens for reply in replies)
        meta |= {"prompt_tokens": tokens, "cached_tokens": cached}
        return ScoredPair(logits[best], reranker.score(logits[best]), tokens, cached, items[best].report, meta)


def lengths(queries: Sequence[str], documents: Sequence[str], instruct: str | None = None) -> list[int]:
    """Number of characters of each pair, including the instruction."""
    more = len(instruct or "")
    return [len(query) + len(document) + more for query, document in zip(queries, documents, strict=True)]


def check_query(query: str) -> None:
    """RequestError with SGLang's text for an empty query."""
    if not query:
        raise RequestError("Query cannot be empty", param="query")
    if not query.strip():
        raise RequestError("Query cannot be empty or whitespace only", param="query")


def check_documents(documents: Sequence[str]) -> None:
    """RequestError with SGLang's text for no documents, or an empty one."""
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


def usage(scored: Sequence[ScoredPair]) -> Usage:
    """OpenAI's object for the tokens of all pairs."""
    return token_usage(sum(one.prompt_tokens for one in scored), cached=sum(one.cached_tokens for one in scored))


def new_id(kind: str) -> str:
    """An id for a response; ids of its requests have an index appended."""
    return f"{kind}-{new_rid()}"
