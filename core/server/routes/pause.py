"""``/pause_generation`` and ``/continue_generation``, for models of every task."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Annotated, Any, Literal, TypedDict

from litestar import Response, post
from litestar.handlers import HTTPRouteHandler
from msgspec import Struct

from trunkline.core.client.models import ModelsQuery, named_model
from trunkline.core.server.api.bodies import AnyRequest, json_response, read_optional_body
from trunkline.core.server.api.fields import Ignored
from trunkline.core.types import EngineClient, ServedModel


class PauseBody(Struct):
    """The body of ``POST /pause_generation``, which may be missing."""

    mode: Literal["abort", "retract", "in_place"] | None = "abort"


class ContinueBody(Struct):
    """The body of ``POST /continue_generation``, which may be missing."""

    torch_empty_cache: Annotated[Any, Ignored("freed memory is returned to the system automatically")] = None


class PauseReply(TypedDict):
    """SGLang's reply to both."""

    message: str
    status: Literal["ok"]


def pause_routes(engine: EngineClient) -> Iterator[HTTPRouteHandler]:
    declared = {"query": ModelsQuery, "replies": PauseReply, "body_required": False}
    admin = {"scope": "admin", "replicas": "first", **declared}

    def selected(request: AnyRequest) -> list[ServedModel]:
        named = named_model(engine.models, request.query_params.get("model"))
        return [named] if named else [*engine.models]

    @post("/pause_generation", opt=admin | {"body": PauseBody}, status_code=200)
    async def pause_generation(request: AnyRequest) -> Response[bytes]:
        """Stop computing until /continue_generation. New requests wait; by default others are aborted."""
        body = await read_optional_body(request, PauseBody)
        mode = body.mode or "abort"
        models = selected(request)
        if mode == "abort":  # also in the front: some requests may not have reached the engine
            for model in models:
                engine.abort(everything=True, model=model.name)
        await asyncio.gather(*[engine.call("pause", model=model.name, mode=mode) for model in models])
        return json_response({"message": "Generation paused successfully.", "status": "ok"})

    @post("/continue_generation", opt=admin | {"body": ContinueBody}, status_code=200)
    async def continue_generation(request: AnyRequest) -> Response[bytes]:
        """End a pause. Does nothing without one."""
        await read_optional_body(request, ContinueBody)
        await asyncio.gather(*[engine.call("continue", model=model.name) for model in selected(request)])
        return json_response({"message": "Generation continued successfully.", "status": "ok"})

    yield from (pause_generation, continue_generation)
