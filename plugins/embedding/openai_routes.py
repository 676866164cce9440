"""``POST /v1/embeddings``, OpenAI's route."""

from __future__ import annotations

import base64
from typing import Any, cast

from litestar import Response, post

from trunkline.core.errors import RequestError
from trunkline.core.server.api import (
    AnyRequest,
    Inputs,
    encode_json,
    json_response,
    locate_errors,
    read_body,
    read_salt,
    token_usage,
    while_connected,
)

from .body_schemas import EmbeddingsBody
from .reply_schemas import EmbeddingsEntry, EmbeddingsReply
from .service import Array, EmbeddedInputs, EmbeddingRequest, Service

FORMATS = ("float", "base64")


def openai_routes(service: Service) -> list[Any]:
    """The handlers, which use ``service``."""

    @post(
        "/v1/embeddings",
        opt={"scope": "infer", "dialect": "openai", "body": EmbeddingsBody, "replies": EmbeddingsReply},
        status_code=200,
        summary="Embed texts or token ids, as OpenAI does",
        description="encoding_format base64 gives float32 numbers, little endian.",
    )
    async def embeddings(request: AnyRequest) -> Response[Any]:
        body = await read_body(request, EmbeddingsBody)
        form = body.encoding_format or "float"
        if form not in FORMATS:
            raise RequestError(f"encoding_format must be float or base64, not {form!r}.", param="encoding_format")
        embedding_request = EmbeddingRequest(
            inputs=read_input(body.input),
            model=body.model,
            prompt=body.prompt,
            prompt_name=body.prompt_name,
            truncate=body.truncate,
            normalize=body.normalized if body.normalize is None else body.normalize,
            dimensions=body.dimensions,
            rid=body.rid,
            priority=body.priority,
            salt=read_salt(body.cache_salt, body.extra_key),
            guard_ids=True,
        )
        embedded = await while_connected(request, service.embed(embedding_request))
        return json_response(await service.off_loop(len(embedded.items), lambda: encode_json(_answer(embedded, form))))

    return [embeddings]


def read_input(given: str | list[str | int | list[int]]) -> Inputs:
    """``input``: a text, texts, token ids, or lists of token ids. RequestError for empty inputs and mixed types."""
    if not given:
        raise RequestError("Input cannot be empty", param="input")
    if isinstance(given, str):
        return Inputs(texts=[_text(given)], single=True)
    if set(map(type, given)) == {int}:  # there may be a million
        return Inputs(ids=[cast("list[int]", given)], single=True)
    texts = [entry for entry in given if isinstance(entry, str)]
    if len(texts) == len(given):
        return Inputs(texts=[_text_at(index, text) for index, text in enumerate(texts)])
    ids = [entry for entry in given if isinstance(entry, list)]
    if len(ids) < len(given):
        raise RequestError("input must hold only texts, only token ids, or only lists of token ids.", param="input")
    for index, one in enumerate(ids):
        with locate_errors("input", index):
            if not one:
                raise RequestError("Input cannot be empty", param="input")
    return Inputs(ids=ids)


def _text(text: str) -> str:
    if not text.strip():
        raise RequestError("Input cannot be empty or whitespace only", param="input")
    return text


def _text_at(index: int, text: str) -> str:
    with locate_errors("input", index):
        return _text(text)


def _answer(embedded: EmbeddedInputs, form: str) -> EmbeddingsReply:
    data = [_entry(index, vector, form) for index, vector in enumerate(embedded.vectors())]
    for entry, item in zip(data, embedded.items, strict=True):
        if item.cut:
            entry["meta_info"] = item.report
    return {
        "object": "list",
        "data": data,
        "model": embedded.served.model_path,
        "usage": token_usage(embedded.tokens),
    }


def _entry(index: int, vector: Array, form: str) -> EmbeddingsEntry:
    numbers = vector.tolist() if form == "float" else base64.b64encode(vector.tobytes()).decode()
    return {"object": "embedding", "index": index, "embedding": numbers}
