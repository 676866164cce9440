"""The main function of the front process: starts the engine, serves HTTP, and drains on SIGTERM."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
import socket
import sys
from collections.abc import Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any

from trunkline.core.client.client import Client
from trunkline.core.client.supervisor import COMMAND, supervised
from trunkline.core.client.transport import Connect, EndingTransport
from trunkline.core.config import Config
from trunkline.core.errors import ConfigError, EngineDown, RequestError, TrunklineError
from trunkline.core.guard import forbid_pickle
from trunkline.core.host import Host
from trunkline.core.model.sources.tokenizer import import_without_torch
from trunkline.core.settings import ServerSettings

from .lifecycle import Lifecycle

if TYPE_CHECKING:
    import uvicorn
    from litestar import Litestar

log = logging.getLogger("trunkline.server")

READY_MESSAGE = "The server is fired up and ready to roll!"  # SGLang's text; scripts wait for this line
TICK = 0.05  # seconds between checks
PROBES = 3  # attempts of a model's first request, where it has several replicas


Engine = Client[EndingTransport]


def serve(host: Host, config: Config, *, command: Sequence[str] = COMMAND) -> None:
    """Serve until SIGTERM or SIGINT, then drain and return.

    Raises ConfigError when the port is taken, ModelError when a model can't be served, and
    TrunklineError when the engine keeps crashing.
    """
    forbid_pickle()
    for model in config.models:  # here, so that downloads show their progress and can be interrupted
        host.resolve_model(model.reference)
    run_front(host, config, supervised(config, command=command))


def run_front(host: Host, config: Config, connect: Connect) -> None:
    """As :func:`serve`, with the engine that ``connect`` gives."""
    with bind(config.server) as sock:
        run = event_loop_runner()
        run(Front(host, config, sock, connect).run())


def application(host: Host, config: Config, engine: Engine) -> tuple[Litestar, Lifecycle]:
    """The routes over an engine that is ready, and the state that its health routes report."""
    from .app import create_app

    status, transport = engine.status, engine.transport
    lifecycle = Lifecycle(warm=False, healthy=lambda: transport.healthy, results=lambda: status.results)
    app = create_app(
        host,
        engine,
        config.settings,
        models=config.models,
        lifecycle=lifecycle,
        status=status.model_state,
        metrics=engine.metrics,
        replicated=transport.replicated,
    )
    return app, lifecycle


async def probe_model(engine: Engine, model: str) -> None:
    """Run a request. RequestError when it fails, or when no replica has answered after some attempts."""
    for attempt in range(PROBES):
        try:
            await engine.call("probe", model=model)
            return
        except EngineDown:  # one of several replicas was lost
            if not engine.replicas or attempt == PROBES - 1:
                raise


def bind(server: ServerSettings) -> socket.socket:
    """A bound socket that doesn't listen yet: a port in use is reported before models are loaded, and clients can't
    connect until they are."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(server.host, server.port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind, protocol)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as error:
        raise ConfigError(
            f"Can't listen on {server.host} port {server.port}: {error.strerror or error}. "
            "Choose another with --port or --host."
        ) from None
    return sock


def event_loop_runner() -> Callable[[Coroutine[Any, Any, None]], None]:
    """The function that runs the front's coroutine, in uvloop where that exists."""
    if sys.platform == "win32":
        return asyncio.run
    import uvloop

    return uvloop.run


def prepare() -> None:
    """Import the HTTP server while the engine starts."""
    import_without_torch()
    from . import app, banner, http_protocol  # noqa: F401


class Front:
    """Runs the server once: starts the engine, serves, drains."""

    def __init__(self, host: Host, config: Config, sock: socket.socket, connect: Connect) -> None:
        self._host = host
        self._config = config
        self._socket = sock
        self._connect = connect
        self._stop = asyncio.Event()  # SIGTERM or SIGINT was received: drain and stop
        self._stop_now = asyncio.Event()  # a second signal was received: stop without waiting for running requests

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        engine: Engine = Client(self._config, self._host, self._connect)
        stopping = asyncio.create_task(self._stop.wait(), name="stop signal")
        try:
            starting = asyncio.create_task(engine.start(prepare), name="engine start")
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
            self._stop_now.set()
        self._stop.set()

    async def _serve(self, engine: Engine, stopping: asyncio.Task[Any]) -> None:
        from .banner import show
        from .http_protocol import Server, uvicorn_config

        app, lifecycle = application(self._host, self._config, engine)
        server = Server(uvicorn_config(app))
        serving = asyncio.create_task(server.serve(sockets=[self._socket]), name="http server")
        ended = engine.transport.ended
        try:
            if not await self._warm_up(engine, server, serving, stopping):
                return
            lifecycle.warm = True
            show(self._host, self._config, engine, app, self._socket.getsockname())
            gc.freeze()  # exempts modules and tokenizers from garbage collection, which would scan them each time
            print(READY_MESSAGE, flush=True)
            await asyncio.wait({serving, stopping, ended}, return_when=asyncio.FIRST_COMPLETED)
            if self._stop.is_set():
                lifecycle.draining = True
                await self._drain(engine, server)
            if ended.done():
                raise TrunklineError(ended.result())
        finally:
            await engine.stop()  # requests still in flight fail
            server.should_exit = True
            await serving

    async def _warm_up(
        self,
        engine: Engine,
        server: uvicorn.Server,
        serving: asyncio.Task[None],
        stopping: asyncio.Task[Any],
    ) -> bool:
        """Listen, and run one request per model. False when the server was stopped meanwhile."""
        while not server.started:
            if serving.done():
                serving.result()
                raise TrunklineError("The HTTP server did not start.")
            await asyncio.sleep(TICK)
        if self._config.server.skip_server_warmup:
            return True
        for model in engine.models:
            probe = asyncio.ensure_future(probe_model(engine, model.name))
            await asyncio.wait({probe, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if not probe.done():
                probe.cancel()
                return False
            try:
                probe.result()
            except RequestError as error:
                raise TrunklineError(f"The first request to {model.name} failed: {error.message}") from None
        return True

    async def _drain(self, engine: Engine, server: uvicorn.Server) -> None:
        """Wait until accepted requests are answered, for ``--drain-timeout`` seconds at most."""
        log.info("draining: %d requests in flight", len(server.server_state.tasks))
        deadline = asyncio.get_running_loop().time() + self._config.server.drain_timeout
        for model in engine.models:  # requests of paused models would wait until the deadline
            with contextlib.suppress(EngineDown):  # the answers are not needed
                engine.call("drain", model=model.name)
        while server.server_state.tasks and not self._stop_now.is_set():
            if asyncio.get_running_loop().time() > deadline:
                log.warning("%d requests did not finish in time", len(server.server_state.tasks))
                return
            await asyncio.sleep(TICK)
