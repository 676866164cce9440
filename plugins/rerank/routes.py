"""``/v1/rerank``, ``/rerank`` and ``/v2/rerank``: a ranking, in the format that the client expects."""

from __future__ import annotations

from typing import Any

from litestar import Response, route
from litestar.enums import HttpMethod
from msgspec.structs import replace

from trunkline.core.errors import RequestError
from trunkline.core.server.api import AnyRequest, InvalidBody, json_response, read_body, read_salt, while_connected
from trunkline.core.types import ServedModel

from .body_schemas import RerankBody
from .dialects import DIALECTS, WITH_DOCUMENTS, Ranking, ranked
from .reply_schemas import RANKING, FormatQuery
from .reranker import DOCUMENTS, QUERY, Field, Limits
from .service import ScoringRequest, Service, check_documents, check_query, check_texts, new_id

DOCUMENT_TOKENS = 4096  # default limit on a document's tokens in Cohere's v2 API
CHUNKS = 10  # default limit on a document's chunks in Cohere's v1 API
MAX_CHUNKS = 1000
OBJECTS = ("jina", "cohere")  # formats that are objects, not bare lists
TEXTS = Field("texts")  # TEI's name for documents


def rerank_routes(service: Service) -> list[Any]:
    """The handlers, which use ``service``."""
    opt = {"scope": "infer", "dialect": "openai", "body": RerankBody, "query": FormatQuery, "replies": RANKING}
    methods = [HttpMethod.POST, HttpMethod.PUT]

    @route(
        "/v1/rerank",
        http_method=methods,
        opt=opt,
        status_code=200,
        summary="Rank documents by how well they answer a query",
        description="SGLang's bare list; Cohere's SDKs and LiteLLM get an object; `?format=` chooses.",
    )
    async def v1_rerank(request: AnyRequest) -> Response[Any]:
        body = await read_body(request, RerankBody)
        dialect = _of_v1(service, request, body) if body.texts is None else "tei"
        return await _answer(service, request, body, dialect, "1")

    @route(
        "/rerank",
        http_method=methods,
        opt=opt,
        status_code=200,
        summary="Rank documents, as Jina, Infinity and vLLM (`documents`) or TEI (`texts`) do",
    )
    async def rerank(request: AnyRequest) -> Response[Any]:
        body = await read_body(request, RerankBody)
        return await _answer(service, request, body, "jina" if body.texts is None else "tei", "1")

    @route("/v2/rerank", http_method=methods, opt=opt, status_code=200, summary="Rank documents, as Cohere's v2 does")
    async def v2_rerank(request: AnyRequest) -> Response[Any]:
        body = await read_body(request, RerankBody)
        return await _answer(service, request, body, "cohere", "2")

    return [v1_rerank, rerank, v2_rerank]


def _of_v1(service: Service, request: AnyRequest, body: RerankBody) -> str:
    """The format for a request with ``documents`` to /v1/rerank, which clients of several APIs use.

    Cohere's SDKs (``cohere``, ``cohere-ai``, ``com.cohere…``) and LiteLLM are recognised by their headers, other
    clients of Cohere's API by their fields.
    """
    sdk, agent = (request.headers.get(name, "").lower() for name in ("x-fern-sdk-name", "user-agent"))
    from_cohere = "cohere" in sdk or agent.startswith(("cohere/", "cohere-ai/"))
    if from_cohere or body.rank_fields is not None or body.max_chunks_per_doc is not None:
        return "cohere"
    usual = service.reranker(body.model).settings.rerank_format
    return "jina" if agent.startswith("litellm/") and usual not in OBJECTS else usual


async def _answer(service: Service, request: AnyRequest, body: RerankBody, dialect: str, version: str) -> Response[Any]:
    dialect = request.query_params.get("format", dialect)
    if dialect not in DIALECTS:
        raise RequestError(f"format must be one of {', '.join(DIALECTS)}, got {dialect!r}.", param="format")
    documents, texts = _documents(body)
    reranker = service.reranker(body.model)
    _check(body, texts)
    scoring_request = ScoringRequest(
        queries=[body.query] * len(texts),
        documents=texts,
        limits=limits(reranker.served, body, dialect, version, service.max_batch),
        instruct=body.instruct,
        priority=_priority(body, dialect),
        salt=read_salt(body.cache_salt, body.extra_key),
        fields=(QUERY, DOCUMENTS if body.texts is None else TEXTS),
    )
    name = new_id("rerank")
    scored = await while_connected(request, service.score(reranker, scoring_request, name))
    wanted = body.return_documents if body.return_text is None else body.return_text
    ranking = Ranking(
        id=name,
        model=reranker.served.name,
        scored=scored,
        documents=documents,
        texts=texts,
        order=ranked(scored, body.top_n),
        with_documents=WITH_DOCUMENTS[dialect] if wanted is None else wanted,
        raw_scores=bool(body.raw_scores),
        version=version,
    )
    return json_response(DIALECTS[dialect](ranking))


def _check(body: RerankBody, texts: list[str]) -> None:
    check_query(body.query)
    if body.texts is None:
        check_documents(texts)
    else:
        check_texts(texts, TEXTS)
    for field in ("top_n", "max_chunks_per_doc", "max_tokens_per_doc"):
        value = getattr(body, field)
        if value is not None and value < 1:
            raise RequestError(f"{field} must be at least 1, got {value}.", param=field)
    if (body.max_chunks_per_doc or 0) > MAX_CHUNKS:
        raise RequestError(
            f"max_chunks_per_doc must be at most {MAX_CHUNKS}, got {body.max_chunks_per_doc}.",
            param="max_chunks_per_doc",
        )


def _documents(body: RerankBody) -> tuple[list[str | dict[str, Any]], list[str]]:
    """The documents as the client sent them, and the text of each."""
    if body.documents is None and body.texts is None:
        raise InvalidBody("Object missing required field `documents` (or `texts`)")
    if body.documents is not None and body.texts is not None:
        raise RequestError("documents and texts cannot be provided at the same time", param="texts")
    documents: list[str | dict[str, Any]] = list(body.texts or []) if body.documents is None else body.documents
    fields = list(dict.fromkeys(body.rank_fields or ["text"]))
    return documents, [
        document if isinstance(document, str) else _text(document, fields, index)
        for index, document in enumerate(documents)
    ]


def _text(document: dict[str, Any], fields: list[str], index: int) -> str:
    """The text of a document object: the value of its field, or lines ``field: value`` if there are several."""
    found = [(field, document[field]) for field in fields if document.get(field) is not None]
    if not found:
        raise RequestError(
            f"documents[{index}] has none of the fields {', '.join(fields)}; name its text `text`, or its fields "
            "in rank_fields.",
            param=f"documents[{index}]",
        )
    return str(found[0][1]) if len(fields) == 1 else "\n".join(f"{field}: {value}" for field, value in found)


def limits(served: ServedModel, body: RerankBody, dialect: str, version: str, most: int) -> Limits:
    """The limits on documents. Cohere's APIs truncate by default; the others only if the request says so.

    ``most``: limit on the chunks of all documents, if the request doesn't have ``max_chunks_per_doc``.
    """
    truncate, truncates_by_default = body.truncate, dialect == "cohere"
    if truncate is True and (body.truncation_direction or "").lower() == "left":
        truncate = "start"
    if truncate is None and truncates_by_default:
        truncate = "end"
    shared = max(1, most // max(1, len(body.documents or ())))
    default_chunks = min(CHUNKS, shared) if truncates_by_default and version == "1" else 1
    default_tokens = DOCUMENT_TOKENS if truncates_by_default and version == "2" else None
    return replace(
        Limits.of(served, truncate),
        document=default_tokens if body.max_tokens_per_doc is None else body.max_tokens_per_doc,
        chunks=default_chunks if body.max_chunks_per_doc is None else body.max_chunks_per_doc,
    )


def _priority(body: RerankBody, dialect: str) -> int:
    """The priority, higher first. Cohere's is from 0, first, to 999, last."""
    return -(body.priority or 0) if dialect == "cohere" else body.priority or 0
