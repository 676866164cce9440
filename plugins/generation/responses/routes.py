"""``POST /v1/responses``: OpenAI's route, with the same jobs as ``/v1/chat/completions``."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from litestar import Response, post

from trunkline.core.server.api import JSON, SSE, AnyRequest, OpenAIError, new_rid, read_body
from trunkline.plugins.generation.openai.chat_jobs import make_job
from trunkline.plugins.generation.openai.defaults import chat_defaults
from trunkline.plugins.generation.service import Service

from .chat_body import chat_body, own_names
from .replies import ResponseReply
from .reply_schemas import ResponseEvent, ResponseObject
from .schemas import ResponsesBody


def responses_routes(service: Service) -> list[Any]:
    """The handler of ``/v1/responses``."""
    defaults = lru_cache(maxsize=64)(chat_defaults)  # more models than one server has

    replies = {JSON: ResponseObject, SSE: (ResponseEvent, OpenAIError)}
    opt = {"scope": "infer", "dialect": "openai", "body": ResponsesBody, "replies": {200: replies}}

    @post("/v1/responses", opt=opt, status_code=200, summary="OpenAI responses", operation_id="responses")
    async def responses(request: AnyRequest) -> Response[Any]:
        """A response; nothing is stored, so the earlier items of a conversation are part of the input."""
        body = await read_body(request, ResponsesBody)
        rid = body.rid or f"resp_{new_rid()}"
        chat, places = chat_body(body)
        with own_names(places):
            job, reader = await make_job(service, chat, rid, defaults)
        response: Response[Any] = await ResponseReply(service, job, body, rid, reader).response(request)
        return response

    return [responses]
