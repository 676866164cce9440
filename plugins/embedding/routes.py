"""``POST|PUT /encode``, SGLang's native route."""

from __future__ import annotations

from typing import Any

from litestar import Response, route
from litestar.enums import HttpMethod

from trunkline.core.errors import RequestError
from trunkline.core.server.api import (
    AnyRequest,
    encode_json,
    inputs_from_body,
    json_response,
    read_body,
    read_salt,
    while_connected,
)

from .body_schemas import EncodeBody
from .reply_schemas import EncodeRecord
from .service import EmbeddingRequest, Service


def encode_routes(service: Service) -> list[Any]:
    """The handlers, which use ``service``."""
    replies = EncodeRecord, list[EncodeRecord]
    opt = {"scope": "infer", "dialect": "native", "body": EncodeBody, "replies": replies}

    @route(
        "/encode",
        http_method=[HttpMethod.POST, HttpMethod.PUT],
        opt=opt,
        status_code=200,
        summary="Embed texts or token ids",
        description="One object for a single text or list of ids, else a list in the order of the inputs.",
    )
    async def encode_(request: AnyRequest) -> Response[Any]:
        body = await read_body(request, EncodeBody)
        inputs = inputs_from_body(body.text, body.input_ids)
        if any(not isinstance(text, str) for text in inputs.texts):
            raise RequestError("Pairs of texts are for cross-encoders; see /v1/rerank.", param="text")
        embedding_request = EmbeddingRequest(
            inputs=inputs,
            model=body.model,
            prompt=body.prompt,
            prompt_name=body.prompt_name,
            truncate=body.truncate,
            normalize=body.normalize,
            dimensions=body.dimensions,
            rid=body.rid,
            priority=body.priority,
            salt=read_salt(body.cache_salt, body.extra_key),
        )
        embedded = await while_connected(request, service.embed(embedding_request))

        def write() -> bytes:
            pairs = zip(embedded.vectors(), embedded.metas(), strict=True)
            records: list[EncodeRecord] = [{"embedding": vector.tolist(), "meta_info": meta} for vector, meta in pairs]
            return encode_json(records[0] if inputs.single else records)

        return json_response(await service.off_loop(len(inputs), write))

    return [encode_]
