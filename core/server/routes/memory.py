"""``/release_memory_occupation`` and ``/resume_memory_occupation``, for models of every task."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from litestar import HttpMethod, Response, route
from litestar.handlers import HTTPRouteHandler
from msgspec import Meta, Struct

from trunkline.core.client.models import ModelsQuery, named_model
from trunkline.core.server.api.bodies import AnyRequest, json_response, read_body
from trunkline.core.types import EngineClient


class MemoryBody(Struct):
    """The body of both routes, which is required. No ``tags`` means all of them."""

    tags: Annotated[list[Literal["weights", "kv_cache"]], Meta(max_length=16)] | None = None


def memory_routes(engine: EngineClient) -> Iterator[HTTPRouteHandler]:
    declared = {"query": ModelsQuery, "body": MemoryBody, "replies": type(None)}
    opt: dict[str, Any] = {"scope": "admin", "replicas": "first", **declared}
    methods = [HttpMethod.GET, HttpMethod.POST]

    async def call(control: str, request: AnyRequest) -> Response[bytes]:
        body = await read_body(request, MemoryBody)
        named = named_model(engine.models, request.query_params.get("model"))
        model = named.name if named else None
        await engine.call(control, model=model, tags=body.tags or [], all_models=named is None)
        return json_response(None)

    @route("/release_memory_occupation", http_method=methods, opt=opt, status_code=200)
    async def release(request: AnyRequest) -> Response[bytes]:
        """Release the memory of weights, KV cache or both to the system. Requests wait until it is resumed."""
        return await call("release_memory", request)

    @route("/resume_memory_occupation", http_method=methods, opt=opt, status_code=200)
    async def resume(request: AnyRequest) -> Response[bytes]:
        """Take released memory back, with the same weights. Does nothing for memory that wasn't released."""
        return await call("resume_memory", request)

    yield from (release, resume)
