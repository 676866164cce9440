"""The HTTP process: the application, made of core's and the plugins' routes, and its life."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import socket
import sys
from collections.abc import Callable, Coroutine, Iterable, Sequence
from importlib.metadata import version
from typing import Any

import uvicorn
from litestar import Litestar
from litestar.config.app import AppConfig
from litestar.config.cors import CORSConfig
from litestar.connection import ASGIConnection
from litestar.datastructures import State
from litestar.exceptions import HTTPException
from litestar.handlers import BaseRouteHandler, HTTPRouteHandler

from ..config import Config, ModelSettings
from ..errors import EngineDown, PluginError, RequestError, TrunklineError
from ..guard import forbid_pickle
from ..host import Host
from ..types import EngineClient, Settings
from .auth import SCOPES, Doorkeeper
from .client import RemoteEngine
from .control import Lifecycle, routes
from .docs import openapi_config, openapi_route
from .faults import add_request_id, on_error, on_http_error, on_request_error
from .info import Facts
from .panel import show
from .supervisor import COMMAND
from .transport import Server, bind, uvicorn_config

log = logging.getLogger("trunkline.server")

ROLLING = "The server is fired up and ready to roll!"  # scripts wait for this line
TICK = 0.05


def create_app(
    host: Host,
    engine: EngineClient,
    settings: Settings,
    *,
    models: Sequence[ModelSettings] = (),
    lifecycle: Lifecycle | None = None,
    status: Any = dict,
) -> Litestar:
    """The application over an engine that is ready.

    Asks the hooks ``routes``, ``info`` and ``app_config``; nothing is asked later. Raises
    PluginError when a route declares no scope, or is claimed twice.
    """
    server = settings["server"]
    lifecycle = lifecycle or Lifecycle()
    extras = {model.name: host.info(model, settings) for model in engine.models}
    facts = Facts(settings, models, extras, status)
    own = [("core", handler) for handler in (*routes(engine, lifecycle, facts), openapi_route())]
    handlers = check_routes([*own, *host.routes(engine, settings)])
    origins = list(server.cors_origins)
    return Litestar(
        handlers,
        guards=[_guard(Doorkeeper(server.api_key, server.admin_api_key), lifecycle)],
        exception_handlers={
            RequestError: on_request_error,
            HTTPException: on_http_error,
            Exception: on_error,
        },
        before_send=[add_request_id],
        cors_config=CORSConfig(allow_origins=origins) if origins else None,
        request_max_body_size=server.max_body_bytes,
        openapi_config=openapi_config(version("trunkline")),
        logging_config=None,
        state=State({"server": server, "lifecycle": lifecycle}),
        on_app_init=[_hooked(host)],
    )


def check_routes(found: Iterable[tuple[str, Any]]) -> list[HTTPRouteHandler]:
    """The handlers of (plugin, handler) pairs, each with a scope and a path and method of its own."""
    owners: dict[tuple[str, str], str] = {}
    handlers = []
    for plugin, handler in found:
        if not isinstance(handler, HTTPRouteHandler):
            raise PluginError(plugin, f"a route must be a Litestar HTTP handler, not {handler!r}")
        where = " ".join([*sorted(handler.http_methods), *sorted(handler.paths)])
        if handler.opt.get("scope") not in SCOPES:
            raise PluginError(
                plugin, f'{where} declares no scope; add opt={{"scope": {" | ".join(map(repr, SCOPES))}}}'
            )
        for path in handler.paths:
            for method in handler.http_methods:
                claim = (path, str(method))
                if claim in owners:
                    raise PluginError(plugin, f"{method} {path} is already a route of plugin {owners[claim]!r}")
                owners[claim] = plugin
        handlers.append(handler)
    return handlers


def _hooked(host: Host) -> Any:
    def on_app_init(config: AppConfig) -> AppConfig:
        host.app_config(config)
        return config

    return on_app_init


def _guard(doorkeeper: Doorkeeper, lifecycle: Lifecycle) -> Any:
    """One guard for all routes; Litestar copies the handler for each guard that it calls."""

    async def guard(connection: ASGIConnection[Any, Any, Any, Any], handler: BaseRouteHandler) -> None:
        if connection.scope.get("method") == "OPTIONS":
            return
        scope = str(handler.opt.get("scope", "admin"))  # Litestar's own handlers could come without
        doorkeeper.check(connection, scope)
        if lifecycle.draining and scope == "infer":
            raise EngineDown("The server is shutting down; send the request elsewhere or later.")

    return guard


# -- the process -----------------------------------------------------------------------------


def serve(host: Host, config: Config, *, command: Sequence[str] = COMMAND) -> None:
    """Serve until SIGTERM or SIGINT, then drain and return.

    Raises ConfigError when the port is taken, ModelError when a model can't be served, and
    TrunklineError when the engine keeps crashing.
    """
    forbid_pickle()
    for model in config.models:  # here, so that downloads show their progress and can be interrupted
        host.resolve_model(model.reference)
    with bind(config.server) as sock:
        run = _runner()
        run(Front(host, config, sock, command).run())


def _runner() -> Callable[[Coroutine[Any, Any, None]], None]:
    if sys.platform == "win32":
        return asyncio.run
    import uvloop

    return uvloop.run


class Front:
    """One life of the server."""

    def __init__(self, host: Host, config: Config, sock: socket.socket, command: Sequence[str]) -> None:
        self._host = host
        self._config = config
        self._socket = sock
        self._command = command  # starts the engine process
        self._stop = asyncio.Event()  # SIGTERM or SIGINT came
        self._hurry = asyncio.Event()  # and came again

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        engine = RemoteEngine(self._config, self._host, command=self._command)
        stopping = asyncio.create_task(self._stop.wait(), name="stop signal")
        try:
            starting = asyncio.create_task(engine.start(), name="engine start")
            await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if starting.done():
                starting.result()
                await self._serve(engine, stopping)
            else:
                starting.cancel()
        finally:
            stopping.cancel()
            await engine.stop()

    def _on_signal(self) -> None:
        if self._stop.is_set():
            self._hurry.set()
        self._stop.set()

    async def _serve(self, engine: RemoteEngine, stopping: asyncio.Task[Any]) -> None:
        lifecycle = Lifecycle(warm=False, healthy=lambda: engine.supervisor.healthy, results=lambda: engine.results)
        app = create_app(
            self._host,
            engine,
            self._config.settings,
            models=self._config.models,
            lifecycle=lifecycle,
            status=engine.status,
        )
        server = Server(uvicorn_config(app))
        serving = asyncio.create_task(server.serve(sockets=[self._socket]), name="http server")
        ended = engine.supervisor.ended
        try:
            if not await self._warm_up(engine, server, serving, stopping):
                return
            lifecycle.warm = True
            show(self._host, self._config, engine, app, self._socket.getsockname())
            gc.freeze()  # modules and tokenizers stay: no collection has to walk over them, nor the last one at exit
            print(ROLLING, flush=True)
            await asyncio.wait({serving, stopping, ended}, return_when=asyncio.FIRST_COMPLETED)
            if self._stop.is_set():
                lifecycle.draining = True
                await self._drain(server)
            if ended.done():
                raise TrunklineError(ended.result())
        finally:
            await engine.stop()  # what is still in flight is answered now
            server.should_exit = True
            await serving

    async def _warm_up(
        self, engine: RemoteEngine, server: uvicorn.Server, serving: asyncio.Task[None], stopping: asyncio.Task[Any]
    ) -> bool:
        """Open the port and let every model answer once; False when a stop came first."""
        while not server.started:
            if serving.done():
                serving.result()
                raise TrunklineError("The HTTP server did not start.")
            await asyncio.sleep(TICK)
        if self._config.server.skip_server_warmup:
            return True
        for model in engine.models:
            probe = asyncio.ensure_future(engine.call("probe", model=model.name))
            await asyncio.wait({probe, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if not probe.done():
                probe.cancel()
                return False
            try:
                probe.result()
            except RequestError as error:
                raise TrunklineError(f"The first request to {model.name} failed: {error.message}") from None
        return True

    async def _drain(self, server: uvicorn.Server) -> None:
        """Wait until the requests that were accepted are answered, ``--drain-timeout`` s at most."""
        log.info("draining: %d requests in flight", len(server.server_state.tasks))
        deadline = asyncio.get_running_loop().time() + self._config.server.drain_timeout
        while server.server_state.tasks and not self._hurry.is_set():
            if asyncio.get_running_loop().time() > deadline:
                log.warning("%d requests did not finish in time", len(server.server_state.tasks))
                return
            await asyncio.sleep(TICK)
