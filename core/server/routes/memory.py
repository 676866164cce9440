"""``/release_memory_occupation`` and ``/resume_memory_occupation``, for models of every task."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from litestar import HttpMethod, Response, route
from litestar.handlers import HTTPRouteHandler
from msgspec import Meta, Struct

from trunkline.core.client.models import named_model
from trunkline.core.server.api.bodies import AnyRequest, json_response, read_body
from trunkline.core.types import EngineClient


class MemoryQuery(Struct):
    """The query of both routes."""

    model: Annotated[str, Meta(description="A served name or alias; by default all models.")] = ""


class MemoryBody(Struct):
    """The body of both routes, which must be there; without ``tags`` it means all memory."""

    tags: Annotated[list[Literal["weights", "kv_cache"]], Meta(max_length=16)] | None = None


def memory_routes(engine: EngineClient) -> Iterator[HTTPRouteHandler]:
    opt: dict[str, Any] = {"scope": "admin", "query": MemoryQuery, "body": MemoryBody, "replies": type(None)}
    methods = [HttpMethod.GET, HttpMethod.POST]

    async def call(control: str, request: AnyRequest) -> Response[bytes]:
        body = await read_body(request, MemoryBody)
        named = named_model(engine.models, request.query_params.get("model"))
        model, everywhere = (None, True) if named is None else (named.name, False)
        await engine.call(control, model=model, tags=body.tags or [], everywhere=everywhere)
        return json_response(None)

    @route("/release_memory_occupation", http_method=methods, opt=opt, status_code=200)
    async def release(request: AnyRequest) -> Response[bytes]:
        """Give the memory of weights, of keys and values, or both back to the system; requests wait meanwhile."""
        return await call("release_memory", request)

    @route("/resume_memory_occupation", http_method=methods, opt=opt, status_code=200)
    async def resume(request: AnyRequest) -> Response[bytes]:
        """Take the memory again, with the same weights; harmless for what wasn't released."""
        return await call("resume_memory", request)

    yield from (release, resume)
