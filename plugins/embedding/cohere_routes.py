"""``POST /v1/embed`` and ``POST /v2/embed``, Cohere's routes."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
from litestar import Response, post

from trunkline.core.errors import RequestError
from trunkline.core.server.api import (
    AnyRequest,
    Inputs,
    encode_json,
    json_response,
    locate_errors,
    new_rid,
    read_body,
    while_connected,
)

from .body_schemas import CohereContent, CohereEmbedBody, CohereInput
from .number_types import TYPES, Vectors, to_float
from .reply_schemas import CohereByType, CohereEmbedMeta, CohereFloats, CohereVectors
from .service import EmbeddedInputs, EmbeddingRequest, Service

CONTENT = "content must be a list of texts: {'type': 'text', 'text': '…'}; images are refused."


def cohere_routes(service: Service) -> list[Any]:
    """The handlers, which use ``service``."""
    opt = {"scope": "infer", "dialect": "openai", "body": CohereEmbedBody}

    @post(
        "/v1/embed",
        opt=opt | {"replies": (CohereFloats, CohereByType)},
        status_code=200,
        summary="Embed texts, as Cohere's v1 does",
        description="Lists of floats, or with embedding_types an object with the vectors by type.",
    )
    async def v1_embed(request: AnyRequest) -> Response[Any]:
        body = await read_body(request, CohereEmbedBody)
        return await _answer(service, request, body, version="1")

    @post(
        "/v2/embed",
        opt=opt | {"replies": CohereByType},
        status_code=200,
        summary="Embed texts, as Cohere's v2 does",
        description="The vectors by type; without embedding_types, they are floats.",
    )
    async def v2_embed(request: AnyRequest) -> Response[Any]:
        body = await read_body(request, CohereEmbedBody)
        return await _answer(service, request, body, version="2")

    return [v1_embed, v2_embed]


async def _answer(service: Service, request: AnyRequest, body: CohereEmbedBody, version: str) -> Response[Any]:
    types = read_types(body.embedding_types)
    texts, field = read_texts(body)
    embedding_request = EmbeddingRequest(
        inputs=Inputs(texts=[*texts], field=field),
        model=body.model,
        input_type=body.input_type,
        truncate="end" if body.truncate is None else body.truncate,  # Cohere's default
        max_tokens=body.max_tokens,
        dimensions=body.output_dimension,
        dimensions_field="output_dimension",
        priority=-(body.priority or 0),  # Cohere's 0 is served first
    )
    embedded = await while_connected(request, service.embed(embedding_request))
    name = new_rid()

    def write() -> bytes:
        vectors, meta = np.stack(embedded.vectors()), describe(embedded, field, version)
        if version == "1" and body.embedding_types is None:
            return encode_json(floats(name, vectors, texts, meta))
        return encode_json(by_type(name, vectors, texts, meta, types))

    return json_response(await service.off_loop(len(texts), write))


def read_types(given: list[str] | None) -> list[str]:
    """The types of vectors without repetitions; None and an empty list are floats. RequestError for unknown ones."""
    types = list(dict.fromkeys(given or ["float"]))
    for name in types:
        if name not in TYPES:
            raise RequestError(f"embedding_types can be {', '.join(TYPES)}; got {name!r}.", param="embedding_types")
    return types


def read_texts(body: CohereEmbedBody) -> tuple[list[str], str]:
    """The texts of ``texts`` or ``inputs``, and which of the two it was. RequestError when there are none, or both."""
    if (body.texts is None) == (body.inputs is None):
        raise RequestError("Exactly one of texts and inputs must be given.", param="texts")
    field = "inputs" if body.texts is None else "texts"
    texts = [_text(one, index) for index, one in enumerate(body.inputs or ())] if body.texts is None else body.texts
    if not texts:
        raise RequestError(f"{field} cannot be empty.", param=field)
    return texts, field


def _text(given: CohereInput, index: int) -> str:
    with locate_errors("inputs", index):
        if not given.content:
            raise RequestError(CONTENT)
        return "\n".join(map(_part, given.content))


def _part(given: CohereContent) -> str:
    if given.type != "text" or given.text is None:
        raise RequestError(CONTENT)
    return given.text


def describe(embedded: EmbeddedInputs, field: str, version: str) -> CohereEmbedMeta:
    """``meta``: the version of the API, the number of tokens, and a warning for each truncated text."""
    meta: CohereEmbedMeta = {
        "api_version": {"version": version},
        "billed_units": {"input_tokens": embedded.tokens},
    }
    warnings = [
        f"{field}[{index}] was truncated: of its {item.report.get('original_tokens', 'many more')} tokens "
        f"{len(item.ids)} were used."
        for index, item in enumerate(embedded.items)
        if item.cut
    ]
    if warnings:
        meta["warnings"] = warnings
    return meta


def floats(name: str, vectors: Vectors, texts: list[str], meta: CohereEmbedMeta) -> CohereFloats:
    """The reply of v1 to a request without ``embedding_types``."""
    return {
        "response_type": "embeddings_floats",
        "id": name,
        "embeddings": to_float(vectors),
        "texts": texts,
        "meta": meta,
    }


def by_type(name: str, vectors: Vectors, texts: list[str], meta: CohereEmbedMeta, types: list[str]) -> CohereByType:
    """The reply with the vectors by type."""
    return {
        "response_type": "embeddings_by_type",
        "id": name,
        "embeddings": cast("CohereVectors", {kind: TYPES[kind](vectors) for kind in types}),
        "texts": texts,
        "meta": meta,
    }
