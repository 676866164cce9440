"""The task over HTTP."""

from __future__ import annotations

import uuid
from typing import Any, TypedDict

import msgspec
from litestar import Response, post
from msgspec import Struct

from trunkline.core.errors import RequestError
from trunkline.core.server.api import AnyRequest, json_response, read_body, wait_for_all, while_connected
from trunkline.core.types import EngineClient, Submission

from . import TASK, SurpriseSettings
from .stage import Surprise, SurpriseParams


class SurpriseBody(Struct):
    text: str
    model: str | None = None


class SurpriseReply(TypedDict):
    bits_per_token: float
    tokens: int  # without the first, which has no prediction


def routes(engine: EngineClient, settings: SurpriseSettings) -> list[Any]:
    """Handlers, bound to the engine."""

    @post("/surprise", opt={"scope": "infer", "body": SurpriseBody, "replies": SurpriseReply}, status_code=200)
    async def surprise(request: AnyRequest) -> Response[Any]:
        body = await read_body(request, SurpriseBody)
        model = engine.choose(TASK, body.model)
        [prompt] = await engine.tokenize(model.name, [body.text])
        limit = min(settings.surprise_max_tokens, model.max_request_tokens)
        if len(prompt) > limit:
            raise RequestError(f"The text has {len(prompt)} tokens, the limit is {limit}.", param="text")
        submission = Submission(prompt=prompt, params=SurpriseParams(), rid=uuid.uuid4().hex)
        replies = engine.submit(model.name, TASK, [submission])
        await while_connected(request, wait_for_all(replies))
        result = msgspec.convert(replies[0].data, Surprise)
        tokens = len(prompt) - 1
        reply: SurpriseReply = {"bits_per_token": result.bits / tokens, "tokens": tokens}
        return json_response(reply)

    return [surprise]
