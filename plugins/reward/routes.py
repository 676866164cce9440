"""``POST|PUT /classify``, SGLang's native route."""

from __future__ import annotations

from typing import Any

from litestar import Response, route
from litestar.enums import HttpMethod

from trunkline.core.server.api import AnyRequest, inputs_from_body, json_response, read_body, read_salt, while_connected

from .body_schemas import ClassifyBody
from .reply_schemas import ClassifyRecord
from .service import Service


def classify_routes(service: Service) -> list[Any]:
    """The handlers, which use ``service``."""
    replies = ClassifyRecord, list[ClassifyRecord]
    opt = {"scope": "infer", "dialect": "native", "body": ClassifyBody, "replies": replies}

    @route(
        "/classify",
        http_method=[HttpMethod.POST, HttpMethod.PUT],
        opt=opt,
        status_code=200,
        summary="Score texts or token ids with a classification head",
        description="`embedding` has one score per label. One object for a single input, else a list in their order.",
    )
    async def classify(request: AnyRequest) -> Response[Any]:
        body = await read_body(request, ClassifyBody)
        inputs = inputs_from_body(body.text, body.input_ids)
        work = service.score(
            inputs,
            model=body.model,
            truncate=body.truncate,
            rid=body.rid,
            priority=body.priority,
            salt=read_salt(body.cache_salt, body.extra_key),
        )
        scored = await while_connected(request, work)
        pairs = zip(scored.scores(), scored.metas(), strict=True)
        records: list[ClassifyRecord] = [{"embedding": scores.tolist(), "meta_info": meta} for scores, meta in pairs]
        return json_response(records[0] if inputs.single else records)

    return [classify]
