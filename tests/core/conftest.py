"""Plugins made on the spot, and servers over an engine process that is none (fake_engine.py)."""

from __future__ import annotations

import asyncio
import socket
import sys
import uuid
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import msgspec
import pytest
import uvloop
from litestar import Litestar, Request, Response, post, route
from msgspec import Struct

from trunkline.core.client.client import Client
from trunkline.core.client.supervisor import Supervisor, WatchdogLimits, supervised
from trunkline.core.config import Config
from trunkline.core.discovery import Plugin
from trunkline.core.errors import RequestError
from trunkline.core.hookspecs import hookimpl
from trunkline.core.host import Host
from trunkline.core.server.api import (
    DONE,
    EventStream,
    event_frame,
    json_response,
    read_body,
    wait_for_all,
    while_connected,
)
from trunkline.core.server.app import create_app
from trunkline.core.server.http_protocol import Server, uvicorn_config
from trunkline.core.server.lifecycle import Lifecycle
from trunkline.core.types import ModelSource, Reply, Submission


def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """The server runs on uvloop, whose transports differ from asyncio's in what they refuse."""
    return {"uvloop": uvloop.new_event_loop}


class EchoParams(Struct, omit_defaults=True):
    """What the child's task understands."""

    n: int = 3
    delay: float = 0.0
    queue: float = 0.0
    refuse: bool = False
    fatal: float | msgspec.UnsetType = msgspec.UNSET  # after so many seconds the child dies
    seed: int = 0


class Letters:
    """A tokenizer: one token a character."""

    chat_template: str | None = None
    eos_token_id = 0
    all_special_ids: list[int] = []  # noqa: RUF012

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [1] * add_special_tokens + [ord(char) for char in text]

    def decode(self, ids: Any, *, skip_special_tokens: bool = True) -> str:
        return "".join(map(chr, ids))

    def apply_chat_template(self, conversation: Any, **_: Any) -> str:
        return str(conversation)


class EchoBody(Struct):
    """``POST /echo``."""

    ids: list[int]
    n: int = 3
    delay: float = 0.0
    queue: float = 0.0
    refuse: bool = False
    copies: int = 1
    rid: str = ""
    stream: bool = False
    pad: int = 0  # bytes that each frame is made longer by
    model: str | None = None


async def frames(reply: Reply, pad: int) -> AsyncIterator[bytes]:
    """Cumulative frames; each is built from whatever has arrived by then."""
    while True:
        await reply.wait()
        if reply.error is not None:
            raise reply.error
        yield event_frame({"ids": reply.tokens, "finish": reply.finish, "pad": "x" * pad})
        if reply.finish is not None:
            yield DONE
            return


def echo_routes(engine: Any, settings: Any) -> list[Any]:
    async def answer(request: Request[Any, Any, Any]) -> Response[Any]:
        body = await read_body(request, EchoBody)
        model = engine.choose("echo", body.model)
        params = EchoParams(body.n, body.delay, body.queue, body.refuse)
        rids = [body.rid or uuid.uuid4().hex, *(uuid.uuid4().hex for _ in range(body.copies - 1))]
        items = [Submission(prompt=body.ids, params=params, rid=rid) for rid in rids]
        replies = engine.submit(model.name, "echo", items)
        if body.stream:
            return EventStream(frames(replies[0], body.pad), replies[0].cancel)
        await while_connected(request, wait_for_all(replies))
        return json_response([{"ids": reply.tokens, "finish": reply.finish} for reply in replies] + ["x" * body.pad])

    @route("/echo", http_method=["POST", "PUT"], opt={"scope": "infer", "body": EchoBody}, status_code=200)
    async def native(request: Request[Any, Any, Any]) -> Response[Any]:
        """Says it again."""
        return await answer(request)

    @post("/v1/echo", opt={"scope": "infer", "dialect": "openai"}, status_code=200)
    async def openai(request: Request[Any, Any, Any]) -> Response[Any]:
        return await answer(request)

    @post("/break", opt={"scope": "infer"}, status_code=200)
    async def broken() -> Response[Any]:
        raise ZeroDivisionError("a secret")

    @post("/v1/break", opt={"scope": "infer", "dialect": "openai"}, status_code=200)
    async def broken_openai() -> Response[Any]:
        raise ZeroDivisionError("a secret")

    @post("/wrong", opt={"scope": "infer"}, status_code=200)
    async def wrong() -> Response[Any]:
        raise RequestError("Too odd.", status=500)

    @post("/die", opt={"scope": "infer"}, status_code=200)
    async def die() -> Response[Any]:
        return json_response(await engine.call("die"))

    return [native, openai, broken, broken_openai, wrong, die]


@pytest.fixture
def plugin() -> Callable[..., Plugin]:
    """``plugin("shout", trunkline_settings=function)``: a plugin with these hooks, not installed."""

    def make(name: str, *, mark: bool = True, **functions: Callable[..., Any]) -> Plugin:
        module = ModuleType(f"plugin_{name}")
        for hook, function in functions.items():
            setattr(module, hook, hookimpl(function) if mark else function)
        return Plugin(name, module.__name__, module=module)

    return make


@pytest.fixture
def params() -> type[EchoParams]:
    return EchoParams


@pytest.fixture
def command() -> list[str]:
    """Starts the child; the socket's number is appended."""
    return [sys.executable, str(Path(__file__).parent / "fake_engine.py")]


@pytest.fixture
def host(plugin: Callable[..., Plugin]) -> Host:
    """A host that resolves every model and knows a tokenizer."""
    return Host([plugin(
        "fake",
        trunkline_resolve_model=lambda reference: ModelSource(reference, "/nowhere"),
        trunkline_tokenizer=lambda source: Letters(),
        trunkline_routes=echo_routes,
        trunkline_info=lambda model: {"preferred_sampling_params": '{"n": 1}'},
    )])  # fmt: skip


@pytest.fixture
def configure(host: Host) -> Callable[..., Config]:
    """``configure(model={...}, **server settings)``."""

    def make(*models: dict[str, Any], **server: Any) -> Config:
        return Config.load({"settings": {"server": server}, "models": list(models) or [{"model_path": "m"}]}, host)

    return make


@pytest.fixture
async def start(host: Host, command: list[str], configure: Callable[..., Config]) -> AsyncIterator[Callable[..., Any]]:
    """``await start(*models, limits=..., **server settings)``: a client that is ready."""
    engines: list[Client[Supervisor]] = []

    async def make(*models: dict[str, Any], limits: WatchdogLimits | None = None, **server: Any) -> Client[Supervisor]:
        config = configure(*models, **server)
        engine = Client(config, host, supervised(config, command=command, limits=limits))
        engines.append(engine)
        await engine.start()
        return engine

    yield make
    for engine in engines:
        await engine.stop()


@pytest.fixture
async def listen(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Callable[[Litestar], Any]]:
    """``await listen(app)``: serve it on a free port of 127.0.0.1; the port.

    uvicorn looks ten times a second whether it shall stop, and then sleeps as long once more: here it looks oftener.
    """
    hurried = {"sleep": lambda seconds: asyncio.sleep(min(seconds, 0.01))}
    monkeypatch.setattr("uvicorn.server.asyncio", SimpleNamespace(**{**vars(asyncio), **hurried}))
    running: list[tuple[Any, asyncio.Task[None]]] = []

    async def make(app: Litestar) -> int:
        sock = socket.create_server(("127.0.0.1", 0))
        server = Server(uvicorn_config(app))
        running.append((server, asyncio.create_task(server.serve(sockets=[sock]))))
        while not server.started:
            await asyncio.sleep(0.01)
        port: int = sock.getsockname()[1]
        return port

    yield make
    for server, task in running:
        server.should_exit = server.force_exit = True
        await task
        await server.lifespan.shutdown()  # which force_exit leaves out


@pytest.fixture
async def live(
    host: Host, start: Callable[..., Any], configure: Callable[..., Config], listen: Callable[..., Any]
) -> Callable[..., Any]:
    """``engine, port = await live(**server settings)``: an engine behind a real port."""

    async def make(
        *models: dict[str, Any], lifecycle: Lifecycle | None = None, **server: Any
    ) -> tuple[Client[Supervisor], int]:
        engine: Client[Supervisor] = await start(*models, **server)
        config = configure(*models, **server)
        lifecycle = lifecycle or Lifecycle(results=lambda: engine.status.results)
        app = create_app(
            host,
            engine,
            config.settings,
            models=config.models,
            lifecycle=lifecycle,
            status=engine.status.model_state,
            metrics=engine.metrics,
        )
        return engine, await listen(app)

    return make
