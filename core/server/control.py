"""Routes that every server has, whatever it serves: health, models, cache, aborts, information."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated

from litestar import HttpMethod, Response, get, post, route
from litestar.handlers import HTTPRouteHandler
from msgspec import Meta, Struct

from trunkline.core.errors import RequestError
from trunkline.core.types import EngineClient, ServedModel

from .api import TEXT, AnyRequest, InvalidBody, ModelQuery, json_response, read_body
from .info import Facts
from .models import asked_about, find, named
from .reply_schemas import (
    EnabledPlugin,
    LongModelInfo,
    ModelCard,
    ModelInfo,
    ModelList,
    NativeError,
    ServerInfo,
    WeightVersion,
)

PROBE_SECONDS = 20.0  # what a health probe may take
BUSY_TICK = 0.05  # how often a waiting probe looks for other results
MAX_FLUSH_WAIT = 3600.0
FLUSHED = (
    "Cache flushed.\nPlease check backend logs for more details. "
    "(When there are running or waiting requests, the operation will not be performed.)\n"
)


@dataclass
class Lifecycle:
    """Where the server stands between its start and its end."""

    warm: bool = True  # the first request to oneself was answered
    draining: bool = False  # on its way out
    healthy: Callable[[], bool] = field(default=lambda: True)  # of the engine
    results: Callable[[], int] = field(default=lambda: 0)  # results that the engine has sent so far

    @property
    def ready(self) -> bool:
        return self.warm and not self.draining and self.healthy()


class FlushQuery(Struct):
    """The query of ``/flush_cache``."""

    model: Annotated[str, Meta(description="A served name or alias; by default all models.")] = ""
    timeout: Annotated[float, Meta(ge=0, le=MAX_FLUSH_WAIT, description="Seconds to wait until nothing runs.")] = 0.0


class AbortBody(Struct):
    """``POST /abort_request``."""

    rid: Annotated[str, Meta(max_length=1024)] | None = ""
    abort_all: bool | None = False


def routes(engine: EngineClient, lifecycle: Lifecycle, facts: Facts) -> Iterator[HTTPRouteHandler]:
    """Core's own handlers."""
    yield from health_routes(engine, lifecycle)
    yield from model_routes(engine, facts)
    yield from admin_routes(engine)


# -- health ----------------------------------------------------------------------------------


def health_routes(engine: EngineClient, lifecycle: Lifecycle) -> Iterator[HTTPRouteHandler]:
    prober = Prober(engine, lifecycle)
    methods = [HttpMethod.GET, HttpMethod.HEAD]
    probe = {"scope": "public", "replies": {200: None, 503: None}}

    @route(["/health", "/ready"], http_method=methods, opt=probe, status_code=200)
    async def health() -> Response[bytes]:
        """200 while the engine is up and takes requests, else 503. No request is made."""
        return _bare(lifecycle.ready)

    @route("/health_generate", http_method=methods, opt=probe, status_code=200)
    async def health_generate() -> Response[bytes]:
        """200 when the model has answered the smallest request, or anything else, in time."""
        return _bare(lifecycle.ready and await prober.alive())

    @route("/ping", http_method=methods, opt={"scope": "public", "replies": {200: None}}, status_code=200)
    async def ping() -> Response[bytes]:
        """200: the HTTP process answers."""
        return _bare(True)

    yield from (health, health_generate, ping)


class Prober:
    """Runs one probe at a time; those who ask meanwhile share it."""

    def __init__(self, engine: EngineClient, lifecycle: Lifecycle) -> None:
        self._engine = engine
        self._lifecycle = lifecycle
        self._running: asyncio.Task[bool] | None = None

    async def alive(self) -> bool:
        """Did the probe, or any other request, bring a result within ``PROBE_SECONDS``?

        A queue in front of the probe is no reason to call a busy server dead.
        """
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(self._probe(), name="health probe")
        before, deadline = self._lifecycle.results(), time.monotonic() + PROBE_SECONDS
        while time.monotonic() < deadline:
            done, _ = await asyncio.wait({self._running}, timeout=BUSY_TICK)
            if done:
                return self._running.result()
            if self._lifecycle.results() != before:
                return True
        return False

    async def _probe(self) -> bool:
        try:
            await self._engine.call("probe")
        except RequestError:
            return False
        return True


def _bare(fine: bool) -> Response[bytes]:
    return Response(b"", status_code=200 if fine else 503, media_type="text/plain")


# -- models ----------------------------------------------------------------------------------


def model_routes(engine: EngineClient, facts: Facts) -> Iterator[HTTPRouteHandler]:
    infer = {"scope": "infer", "query": ModelQuery}

    def chosen(request: AnyRequest) -> ServedModel:
        return asked_about(engine.models, request.query_params.get("model"))

    @get("/get_model_info", opt=infer | {"replies": ModelInfo})
    async def get_model_info(request: AnyRequest) -> Response[bytes]:
        """Five keys about the primary model, or the one that ``?model=`` names."""
        return json_response(facts.model_info(chosen(request)))

    @get("/model_info", opt=infer | {"replies": LongModelInfo})
    async def model_info(request: AnyRequest) -> Response[bytes]:
        """More keys about a model than /get_model_info."""
        return json_response(facts.long_model_info(chosen(request)))

    @get(["/get_server_info", "/server_info"], opt=infer | {"replies": ServerInfo})
    async def server_info(request: AnyRequest) -> Response[bytes]:
        """Settings in force, without secrets, and what the engine does now."""
        return json_response(facts.server_info(chosen(request)))

    @get("/get_weight_version", opt=infer | {"replies": WeightVersion})
    async def weight_version(request: AnyRequest) -> Response[bytes]:
        """The label of the weights."""
        return json_response({"weight_version": chosen(request).weight_version})

    @get("/v1/models", opt={"scope": "infer", "dialect": "openai", "replies": ModelList})
    async def list_models() -> Response[bytes]:
        """OpenAI's list of models."""
        return json_response({"object": "list", "data": [facts.card(model) for model in engine.models]})

    @get("/v1/models/{name:path}", opt={"scope": "infer", "dialect": "openai", "replies": ModelCard})
    async def one_model(request: AnyRequest) -> Response[bytes]:
        """OpenAI's card of one model; with one model loaded, any name is that model."""
        wanted = str(request.path_params["name"]).removeprefix("/")
        models = engine.models
        model = find(models, wanted) or find(models, f"/{wanted}")  # a folder's slash is lost on the way
        if model is None and len(models) == 1:
            [model] = models
        if model is None:
            raise RequestError(f"The model '{wanted}' does not exist", param="model", code="model_not_found")
        return json_response(facts.card(model))

    yield from (get_model_info, model_info, server_info, weight_version, list_models, one_model)


# -- administration --------------------------------------------------------------------------


def admin_routes(engine: EngineClient) -> Iterator[HTTPRouteHandler]:
    admin = {"scope": "admin"}
    flush = admin | {"query": FlushQuery, "replies": {200: {TEXT: str}, 400: {TEXT: str}}}
    flusher = Flusher(engine)

    @route("/flush_cache", http_method=[HttpMethod.GET, HttpMethod.POST], opt=flush, status_code=200)
    async def flush_cache(request: AnyRequest) -> Response[str]:
        """Forget all cached prefixes; refused while anything runs or waits, ``?timeout=`` s long."""
        wait = _seconds(request.query_params.get("timeout"))
        chosen = named(engine.models, request.query_params.get("model"))
        problem = await flusher.flush([chosen] if chosen else engine.models, wait)
        return Response(problem or FLUSHED, status_code=400 if problem else 200, media_type="text/plain")

    @post("/abort_request", opt=admin | {"body": AbortBody, "replies": {200: None}}, status_code=200)
    async def abort_request(request: AnyRequest) -> Response[bytes]:
        """End requests whose id begins with ``rid``, or all; they answer with what they have."""
        body = await read_body(request, AbortBody)
        engine.abort(body.rid or "", everything=bool(body.abort_all))
        return _bare(True)

    enabling = admin | {"replies": {200: EnabledPlugin, 404: NativeError}}

    @post("/plugins/{name:str}/enable", opt=enabling, status_code=200)
    async def enable_plugin(request: AnyRequest) -> Response[bytes]:
        """Serve a plugin's tasks again that were switched off because they kept failing."""
        name = str(request.path_params["name"])
        reply: EnabledPlugin = {"plugin": name, "tasks": await engine.call("enable_plugin", plugin=name)}
        return json_response(reply)

    yield from (flush_cache, abort_request, enable_plugin)


class Flusher:
    """Flushes one caller at a time."""

    RETRY_SECONDS = 0.05

    def __init__(self, engine: EngineClient) -> None:
        self._engine = engine
        self._lock = asyncio.Lock()

    async def flush(self, models: Sequence[ServedModel], wait: float) -> str | None:
        """Flush ``models``, retrying for ``wait`` seconds while they are busy; what went wrong."""
        if self._lock.locked():
            return "Another flush_cache is already in progress."
        async with self._lock:
            deadline = time.monotonic() + wait
            left = list(models)
            while True:
                left = [model for model in left if not await self._engine.call("flush_cache", model=model.name)]
                if not left:
                    return None
                if time.monotonic() >= deadline:
                    return "Timed out waiting for idle state." if wait else "Flush cache failed.\n"
                await asyncio.sleep(self.RETRY_SECONDS)


def _seconds(text: str | None) -> float:
    """A duration from the query string, 0 without one."""
    try:
        seconds = 0.0 if text is None else float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds <= MAX_FLUSH_WAIT:
        raise InvalidBody(f"timeout must be a number of seconds in [0, {MAX_FLUSH_WAIT:g}], got {text}.")
    return seconds
