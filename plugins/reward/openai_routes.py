"""``POST /v1/classify``: labels and probabilities, in vLLM's format."""

from __future__ import annotations

import time
from typing import Any, cast

from litestar import Response, post

from trunkline.core.errors import RequestError
from trunkline.core.server.api import (
    AnyRequest,
    Inputs,
    as_id_lists,
    json_response,
    new_rid,
    read_body,
    read_salt,
    token_usage,
    while_connected,
)

from .body_schemas import OpenAIClassifyBody
from .labels import label_of, probabilities
from .reply_schemas import LabelEntry, LabelsReply
from .service import ScoredInputs, Service


def openai_routes(service: Service) -> list[Any]:
    """The handlers, which use ``service``."""

    @post(
        "/v1/classify",
        opt={"scope": "infer", "dialect": "openai", "body": OpenAIClassifyBody, "replies": LabelsReply},
        status_code=200,
        summary="Label texts",
        description="The most probable label of each input, with the probabilities of all.",
    )
    async def classify(request: AnyRequest) -> Response[Any]:
        body = await read_body(request, OpenAIClassifyBody)
        work = service.score(
            _inputs(body),
            model=body.model,
            truncate=body.truncate,
            rid=body.rid,
            priority=body.priority,
            salt=read_salt(body.cache_salt, body.extra_key),
        )
        scored = await while_connected(request, work)
        activate = body.activation if body.use_activation is None else body.use_activation
        return json_response(answer(scored, activate=activate is not False))

    return [classify]


def _inputs(body: OpenAIClassifyBody) -> Inputs:
    if not body.input:
        raise RequestError("input cannot be empty.", param="input")
    if isinstance(body.input, str):
        return Inputs(texts=[body.input], single=True)
    kinds = set(map(type, body.input))  # there may be a million
    if kinds == {str}:
        return Inputs(texts=[entry for entry in body.input if isinstance(entry, str)])
    if str in kinds:
        raise RequestError("input mixes texts and token ids.", param="input")
    ids, single = as_id_lists(cast("list[int | list[int]]", body.input), "input")
    return Inputs(ids=ids, single=single)


def answer(scored: ScoredInputs, *, activate: bool) -> LabelsReply:
    """The reply; with ``activate`` false, ``probs`` are the scores themselves."""
    config = scored.served.info.config
    data: list[LabelEntry] = []
    for index, (scores, item) in enumerate(zip(scored.scores(), scored.items, strict=True)):
        probs = probabilities(config, scores) if activate else scores
        entry: LabelEntry = {
            "index": index,
            "label": label_of(config, int(scores.argmax())),
            "probs": probs.tolist(),
            "num_classes": len(scores),
        }
        data.append({**entry, **item.report})
    tokens = sum(len(item.ids) for item in scored.items)
    return {
        "id": f"classify-{new_rid()}",
        "object": "list",
        "created": int(time.time()),
        "model": scored.served.name,
        "data": data,
        "usage": token_usage(tokens, cached=sum(reply.cached_tokens for reply in scored.replies)),
    }
