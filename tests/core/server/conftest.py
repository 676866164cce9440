"""An engine process that is no engine: it speaks the frames and does what requests ask of it."""

from __future__ import annotations

import asyncio
import socket
import sys
import uuid
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import uvloop
from litestar import Litestar, Request, Response, post, route
from msgspec import Struct

from trunkline.core.config import Config
from trunkline.core.discovery import Found
from trunkline.core.errors import RequestError
from trunkline.core.host import Host
from trunkline.core.server.api import DONE, EventStream, finished, json_response, read_body, sse
from trunkline.core.server.app import create_app
from trunkline.core.server.client import RemoteEngine
from trunkline.core.server.control import Lifecycle
from trunkline.core.server.supervisor import Patience
from trunkline.core.server.transport import Server, uvicorn_config
from trunkline.core.types import ModelSource, Reply, Submission

CHILD = '''
import os, sys, socket, threading, time
import msgspec
from trunkline.core.engine.channel import read_frame
from trunkline.core.engine.messages import *
from trunkline.core.engine.pass_record import PassRecord
from trunkline.core.types import ModelInfo

sock = socket.socket(fileno=int(sys.argv[-1]))
lock = threading.Lock()
first = msgspec.msgpack.decode(read_frame(sock))
models = first["config"]["models"]
record = PassRecord(first["record"])
running = []
alone = []
beating = True
loads = [Load(models[0]["served_model_name"] or models[0]["model_path"], 1, 2, 900, 1000)]
age = 0.0
work = ""
aborted = []

def send(*messages):
    with lock:
        sock.sendall(frame(list(messages)))

def beat():
    while beating:
        send(Beat(0, age, loads, work))
        time.sleep(0.05)

def served(m):
    info = ModelInfo(path="/", architecture="FakeForCausalLM", model_type="fake", context_length=512,
                     vocab_size=1000, hidden_size=8, causal=True)
    return ServedModel(name=m["served_model_name"] or m["model_path"], model_path=m["model_path"],
        tokenizer_path=m["model_path"], info=info, tasks={"echo": True}, refused={"sing": "It can not sing."},
        max_total_tokens=m["max_total_tokens"] or 1000, max_running_requests=4, dtype="float32",
        attention_backend="cpu", fused="")

def run(message):
    """Answer with ``n`` tokens, the prompt's ids repeated, ``delay`` seconds apart."""
    params = msgspec.msgpack.decode(message.params)
    prompt = memoryview(message.prompt).cast("i").tolist()
    time.sleep(params.get("queue", 0))
    if message.key in aborted:
        return
    send(Started(message.key, len(prompt) - 1, 1.0))
    if params.get("refuse"):
        return send(Progress(message.key, [], error=(400, "refused", "text")))
    (alone if message.alone else running).append(message.key)
    record.note([message.key] if message.alone else running)
    if "fatal" in params:  # dies in a pass of its own, or in one with all that run beside it
        time.sleep(params["fatal"])
        record.note([message.key] if message.alone else running)
        os._exit(9)
    n = params.get("n", 3)
    for i in range(n):
        time.sleep(params.get("delay", 0))
        if message.key in aborted:
            break
        finish = {"type": "length", "length": n} if i == n - 1 else None
        data = msgspec.msgpack.encode({"step": i})
        send(Progress(message.key, [prompt[i % len(prompt)]], data=data, finish=finish, cached=len(prompt) - 1))
    (alone if message.alone else running).remove(message.key)

def call(message):
    global beating, age, work
    if message.control == "probe":
        send(Answer(message.key, {"type": "length"}))
    elif message.control == "flush_cache":
        send(Answer(message.key, not busy()))
    elif message.control == "aborted":
        send(Answer(message.key, len(aborted)))
    elif message.control == "die":
        record.note([message.key])
        os._exit(7)
    elif message.control == "alone":
        send(Answer(message.key, alone))
    elif message.control == "silent":
        beating = False
    elif message.control == "hang":
        age = 1000.0
    elif message.control == "beat":
        age, work = message.arguments["age"], message.arguments.get("work", "")
        send(Beat(0, age, loads, work), Answer(message.key, None))
    elif message.control == "nonsense":
        with lock:
            sock.sendall((5).to_bytes(4, "little") + b"abcde")
    else:
        send(Answer(message.key, error=(404, "no such control", None)))

def busy():
    return any(t.name == "work" and t.is_alive() for t in threading.enumerate())

mode = models[0]["revision"]
if mode == "fails":
    send(Failed("The model is made of cheese."))
    sys.exit(1)
if mode == "dies":
    os._exit(3)
if mode == "once":
    mark = models[0]["chat_template"] + ".mark"
    if os.path.exists(mark):
        os._exit(4)
    open(mark, "w").close()
send(Loading("warming up"))
if mode == "slow":
    time.sleep(600)
send(Ready([served(m) for m in models],
    [{"model": "m", "weight_bytes": 1, "kv_bytes": 2048, "tokens": 1000}], {"load": 0.1}))
threading.Thread(target=beat, daemon=True).start()
while (body := read_frame(sock)) is not None:
    for message in front_decoder.decode(body):
        if isinstance(message, Submit):
            threading.Thread(target=run, args=(message,), daemon=True, name="work").start()
        elif isinstance(message, Abort):
            aborted.append(message.key)
            if message.key not in record.keys():  # which it is busy with
                send(Progress(message.key, [], finish={"type": "abort", "message": "Aborted"}))
        elif isinstance(message, Call):
            call(message)
        elif isinstance(message, Stop):
            os._exit(0)
'''


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
        yield sse({"ids": reply.tokens, "finish": reply.finish, "pad": "x" * pad})
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
        await finished(request, replies)
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
def params() -> type[EchoParams]:
    return EchoParams


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    """Starts the child; the socket's number is appended."""
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    return [sys.executable, str(script)]


@pytest.fixture
def host(plugin: Callable[..., Found]) -> Host:
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
    """``await start(*models, patience=..., **server settings)``: a RemoteEngine that is ready."""
    engines: list[RemoteEngine] = []

    async def make(*models: dict[str, Any], patience: Patience | None = None, **server: Any) -> RemoteEngine:
        engine = RemoteEngine(configure(*models, **server), host, command=command, patience=patience)
        engines.append(engine)
        await engine.start()
        return engine

    yield make
    for engine in engines:
        await engine.stop()


@pytest.fixture
async def listen() -> AsyncIterator[Callable[[Litestar], Any]]:
    """``await listen(app)``: serve it on a free port of 127.0.0.1; the port."""
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


@pytest.fixture
async def live(
    host: Host, start: Callable[..., Any], configure: Callable[..., Config], listen: Callable[..., Any]
) -> Callable[..., Any]:
    """``engine, port = await live(**server settings)``: an engine behind a real port."""

    async def make(
        *models: dict[str, Any], lifecycle: Lifecycle | None = None, **server: Any
    ) -> tuple[RemoteEngine, int]:
        engine: RemoteEngine = await start(*models, **server)
        config = configure(*models, **server)
        lifecycle = lifecycle or Lifecycle(results=lambda: engine.status.results)
        app = create_app(
            host,
            engine,
            config.settings,
            models=config.models,
            lifecycle=lifecycle,
            status=engine.status.of,
            metrics=engine.metrics,
        )
        return engine, await listen(app)

    return make
