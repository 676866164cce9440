"""``/pause_generation`` and ``/continue_generation``, for models of every task."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Annotated, Any, Literal, TypedDict

from litestar import Response, post
from litestar.handlers import HTTPRouteHandler
from msgspec import Meta, Struct

from trunkline.core.client.models import named_model
from trunkline.core.server.api.bodies import AnyRequest, json_response, read_optional_body
from trunkline.core.server.api.fields import Ignored
from trunkline.core.types import EngineClient, ServedModel


class PauseQuery(Struct):
    """The query of both routes."""

    model: Annotated[str, Meta(description="A served name or alias; by default all models.")] = ""


class PauseBody(Struct):
    """``POST /pause_generation``; the body may be missing."""

    mode: Literal["abort", "retract", "in_place"] | None = "abort"


class ContinueBody(Struct):
    """``POST /continue_generation``; the body may be missing."""

    torch_empty_cache: Annotated[Any, Ignored("freed memory goes back to the system by itself")] = None


class PauseReply(TypedDict):
    """SGLang's answer to both."""

    message: str
    status: Literal["ok"]


def pause_routes(engine: EngineClient) -> Iterator[HTTPRouteHandler]:
    admin = {"scope": "admin", "query": PauseQuery, "replies": PauseReply, "body_required": False}

    def chosen(request: AnyRequest) -> list[ServedModel]:
        named = named_model(engine.models, request.query_params.get("model"))
        return [named] if named else [*engine.models]

    @post("/pause_generation", opt=admin | {"body": PauseBody}, status_code=200)
    async def pause(request: AnyRequest) -> Response[bytes]:
        """Compute nothing until /continue_generation; new requests wait. By default running ones are ended."""
        body = await read_optional_body(request, PauseBody)
        mode = body.mode or "abort"
        models = chosen(request)
        if mode == "abort":  # here, too: some may not have reached the engine
            for model in models:
                engine.abort(everything=True, model=model.name)
        await asyncio.gather(*[engine.call("pause", model=model.name, mode=mode) for model in models])
        return json_response({"message": "Generation paused successfully.", "status": "ok"})

    @post("/continue_generation", opt=admin | {"body": ContinueBody}, status_code=200)
    async def go_on(request: AnyRequest) -> Response[bytes]:
        """End a pause; harmless without one."""
        await read_optional_body(request, ContinueBody)
        await asyncio.gather(*[engine.call("continue", model=model.name) for model in chosen(request)])
        return json_response({"message": "Generation continued successfully.", "status": "ok"})

    yield from (pause, go_on)
