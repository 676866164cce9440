"""``/flush_cache``, ``/abort_request`` and ``/plugins/NAME/enable``."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Annotated

from litestar import HttpMethod, Response, post, route
from litestar.handlers import HTTPRouteHandler
from msgspec import Meta, Struct

from trunkline.core.client.models import ModelsQuery, named_model
from trunkline.core.errors import EngineDown
from trunkline.core.server.api.bodies import AnyRequest, empty_response, json_response, read_body
from trunkline.core.server.api.body_limits import InvalidBody
from trunkline.core.server.api.media_types import TEXT
from trunkline.core.server.api.reply_schemas import EnabledPlugin, NativeError
from trunkline.core.types import EngineClient, ServedModel, current_replica

MAX_FLUSH_WAIT = 3600.0  # seconds
ABORT_SECONDS = 2.0  # for the answers of replicas
FLUSHED = (
    "Cache flushed.\nPlease check backend logs for more details. "
    "(When there are running or waiting requests, the operation will not be performed.)\n"
)


class FlushQuery(ModelsQuery):
    """Query parameters of ``/flush_cache``."""

    timeout: Annotated[
        float, Meta(ge=0, le=MAX_FLUSH_WAIT, description="Seconds to wait until no request waits or runs.")
    ] = 0.0


class AbortBody(Struct):
    """The body of ``POST /abort_request``."""

    rid: Annotated[str, Meta(max_length=1024)] | None = ""
    abort_all: bool | None = False


def admin_routes(engine: EngineClient) -> Iterator[HTTPRouteHandler]:
    admin = {"scope": "admin"}
    flush = admin | {"replicas": "first", "query": FlushQuery, "replies": {200: {TEXT: str}, 400: {TEXT: str}}}
    abort = admin | {"replicas": "once", "body": AbortBody, "replies": {200: None}}
    flusher = Flusher(engine)

    @route("/flush_cache", http_method=[HttpMethod.GET, HttpMethod.POST], opt=flush, status_code=200)
    async def flush_cache(request: AnyRequest) -> Response[str]:
        """Empty the prefix cache. Fails while requests run or wait, with ``?timeout=`` after as many seconds."""
        wait = _parse_timeout(request.query_params.get("timeout"))
        named = named_model(engine.models, request.query_params.get("model"))
        problem = await flusher.flush([named] if named else engine.models, wait)
        return Response(problem or FLUSHED, status_code=400 if problem else 200, media_type=TEXT)

    @post("/abort_request", opt=abort, status_code=200)
    async def abort_request(request: AnyRequest) -> Response[bytes]:
        """Abort requests whose id starts with ``rid``, or all. They answer with their output so far."""
        body = await read_body(request, AbortBody)
        engine.abort(body.rid or "", everything=bool(body.abort_all))
        if engine.replicas:  # they may run requests of other fronts
            with suppress(EngineDown, TimeoutError):
                async with asyncio.timeout(ABORT_SECONDS):
                    await engine.call("abort_requests", prefix=body.rid or "", everything=bool(body.abort_all))
        return empty_response()

    enable = admin | {"replicas": "first", "replies": {200: EnabledPlugin, 404: NativeError}}

    @post("/plugins/{name:str}/enable", opt=enable, status_code=200)
    async def enable_plugin(request: AnyRequest) -> Response[bytes]:
        """Switch a plugin's tasks on again, which were switched off after repeated failures."""
        name = str(request.path_params["name"])
        reply: EnabledPlugin = {"plugin": name, "tasks": await engine.call("enable_plugin", plugin=name)}
        return json_response(reply)

    yield from (flush_cache, abort_request, enable_plugin)


class Flusher:
    """Flushes caches, for one caller at a time in each replica."""

    RETRY_SECONDS = 0.05  # interval between attempts

    def __init__(self, engine: EngineClient) -> None:
        self._engine = engine
        self._flushing: set[str | None] = set()  # replicas; None is the engine where there are none

    async def flush(self, models: Sequence[ServedModel], wait: float) -> str | None:
        """Flush ``models``, retrying for ``wait`` seconds while they are busy. Returns the error message, if any."""
        replica = current_replica.get()
        if replica in self._flushing:
            return "Another flush_cache is already in progress."
        self._flushing.add(replica)
        try:
            deadline = time.monotonic() + wait
            busy = list(models)
            while True:
                busy = [model for model in busy if not await self._engine.call("flush_cache", model=model.name)]
                if not busy:
                    return None
                if time.monotonic() >= deadline:
                    return "Timed out waiting for idle state." if wait else "Flush cache failed.\n"
                await asyncio.sleep(self.RETRY_SECONDS)
        finally:
            self._flushing.discard(replica)


def _parse_timeout(text: str | None) -> float:
    """``?timeout=`` in seconds, 0 by default. InvalidBody when it is no number or out of range."""
    try:
        seconds = 0.0 if text is None else float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds <= MAX_FLUSH_WAIT:
        raise InvalidBody(f"timeout must be a number of seconds in [0, {MAX_FLUSH_WAIT:g}], got {text}.")
    return seconds
