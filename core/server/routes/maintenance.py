"""``/start_profile``, ``/stop_profile``, ``/freeze_gc``, ``/configure_logging`` and ``/slow_down``."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from litestar import HttpMethod, Response, route
from litestar.handlers import HTTPRouteHandler
from msgspec import Meta, Struct

from trunkline.core.server.api.bodies import AnyRequest, empty_response, json_response, read_body, read_optional_body
from trunkline.core.server.api.fields import Ignored, Refused
from trunkline.core.server.api.media_types import TEXT
from trunkline.core.server.api.reply_schemas import NativeError
from trunkline.core.types import Count, EngineClient

REQUEST_LOG = "trunkline.request"  # the logger of one line per request

Level = Literal[
    "debug", "info", "warning", "error", "critical", "DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL",
]  # fmt: skip
ChosenByServer = Annotated[Any, Ignored("the server chooses: SGLANG_TORCH_PROFILER_DIR names the folder")]
SingleTrace = Annotated[Any, Ignored("there is one trace, of passes that mix prompts and decoding")]
NotStored = Annotated[Any, Refused("{field} is not supported: the texts of requests are never written anywhere.")]
NeverLogged = Annotated[Any, Ignored("a line about a request never has its text")]
OnlyWithDumps = Annotated[Any, Ignored("it matters only with dump_requests_folder, which is refused")]


class ProfileBody(Struct):
    """The body of ``/start_profile``, which may be missing."""

    start_step: Count | None = None
    num_steps: Count | None = None
    activities: Annotated[list[Annotated[str, Meta(max_length=64)]], Meta(max_length=16)] | None = None
    with_stack: bool | None = None
    record_shapes: bool | None = None
    output_dir: ChosenByServer = None
    profile_prefix: ChosenByServer = None
    profile_id: ChosenByServer = None
    profile_by_stage: SingleTrace = None
    profile_stages: SingleTrace = None
    merge_profiles: SingleTrace = None


class LoggingBody(Struct):
    """The body of ``/configure_logging``."""

    log_requests: bool | None = None
    log_level: Level | None = None
    log_requests_level: NeverLogged = None
    log_requests_format: NeverLogged = None
    dump_requests_folder: NotStored = None
    crash_dump_folder: NotStored = None
    dump_requests_threshold: OnlyWithDumps = None
    dump_requests_exclude_meta_keys: OnlyWithDumps = None


class PaceBody(Struct):
    """The body of ``/slow_down``."""

    forward_sleep_time: Annotated[float, Meta(le=10, description="Seconds.")] | None = None


def maintenance_routes(engine: EngineClient) -> Iterator[HTTPRouteHandler]:
    methods = [HttpMethod.GET, HttpMethod.POST]
    admin: dict[str, Any] = {"scope": "admin"}
    text = {200: {TEXT: str}}
    stopping = admin | {"replicas": "first", "replies": {**text, 400: NativeError}}
    starting = admin | {"replicas": "first", "body": ProfileBody, "body_required": False, "replies": text}
    freezing = admin | {"replicas": "once", "replies": text}
    logged = admin | {"replicas": "once", "body": LoggingBody, "replies": {200: None}}
    slower = admin | {"replicas": "first", "body": PaceBody, "replies": type(None)}

    @route("/start_profile", http_method=methods, opt=starting, status_code=200)
    async def start_profile(request: AnyRequest) -> Response[str]:
        """Profile the engine's passes with torch.profiler: ``num_steps`` of them, from ``start_step`` on."""
        body = await read_optional_body(request, ProfileBody)
        await engine.call(
            "start_profile",
            start_step=body.start_step,
            num_steps=body.num_steps,
            memory="MEM" in (body.activities or ()),
            with_stack=bool(body.with_stack),
            record_shapes=bool(body.record_shapes),
        )
        return Response("Start profiling.\n", media_type=TEXT)

    @route("/stop_profile", http_method=methods, opt=stopping, status_code=200)
    async def stop_profile() -> Response[str]:
        """Stop the profile and write its trace to a file on the server. Its path is in the log."""
        await engine.call("stop_profile")
        return Response("Stop profiling. This will take some time.\n", media_type=TEXT)

    @route("/freeze_gc", http_method=methods, opt=freezing, status_code=200)
    async def freeze_gc() -> Response[str]:
        """Exempt all objects that exist now from garbage collection, in both processes."""
        gc.collect()
        gc.freeze()
        await engine.call("freeze_gc")
        return Response("Garbage collection frozen.\n", media_type=TEXT)

    @route("/configure_logging", http_method=methods, opt=logged, status_code=200)
    async def configure_logging(request: AnyRequest) -> Response[bytes]:
        """Switch the log line about each request on or off, and set the log level of both processes."""
        body = await read_body(request, LoggingBody)
        if body.log_requests is not None:
            logging.getLogger(REQUEST_LOG).setLevel(logging.NOTSET if body.log_requests else logging.WARNING)
        if body.log_level is not None:
            logging.getLogger().setLevel(body.log_level.upper())
            await engine.call("log_level", level=body.log_level)
        return empty_response()

    @route("/slow_down", http_method=methods, opt=slower, status_code=200)
    async def slow_down(request: AnyRequest) -> Response[bytes]:
        """Make the engine sleep after each pass, for experiments. null ends it."""
        body = await read_body(request, PaceBody)
        await engine.call("slow_down", forward_sleep_time=body.forward_sleep_time)
        return json_response(None)

    yield from (start_profile, stop_profile, freeze_gc, configure_logging, slow_down)
