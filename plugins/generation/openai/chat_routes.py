"""``POST /v1/chat/completions``: OpenAI's route, with the same service as ``/generate``."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from litestar import Response, post

from trunkline.core.server.api import JSON, SSE, AnyRequest, OpenAIError, new_rid, read_body
from trunkline.plugins.generation.service import Service

from .chat_jobs import make_job
from .chat_replies import ChatReplies
from .chat_schemas import ChatBody
from .defaults import chat_defaults
from .reply_schemas import ChatChunk, ChatReply


def chat_routes(service: Service) -> list[Any]:
    """The handler of ``/v1/chat/completions``."""
    defaults = lru_cache(maxsize=64)(chat_defaults)  # more models than one server has

    replies = {JSON: ChatReply, SSE: (ChatChunk, OpenAIError)}
    opt = {"scope": "infer", "dialect": "openai", "body": ChatBody, "replies": {200: replies}}

    @post(
        "/v1/chat/completions",
        opt=opt,
        status_code=200,
        summary="OpenAI chat completions",
        operation_id="chat_completions",
    )
    async def chat_completions(request: AnyRequest) -> Response[Any]:
        body = await read_body(request, ChatBody)
        rid = body.rid or f"chatcmpl-{new_rid()}"
        job, reader = await make_job(service, body, rid, defaults)
        response: Response[Any] = await ChatReplies(service, job, body, rid, reader).response(request)
        return response

    return [chat_completions]
