"""Routes of a plugin over several engine replicas: how their replies become one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from litestar import Litestar, Response, get, post
from litestar.params import JSONBody
from msgspec import Struct

from trunkline.core.errors import PluginError, RequestError
from trunkline.core.server.api import SSE, TEXT, AnyRequest, EventStream, json_response, read_body
from trunkline.core.server.app import check_routes
from trunkline.core.server.replicas import added
from trunkline.core.types import ReplicaReply, current_replica, on_each_replica, on_replica

from .fake_replicas import Replicas, make_app

ADMIN = {"scope": "admin"}


class Body(Struct):
    factor: int


def total_of(replies: list[ReplicaReply]) -> Response[Any]:
    return json_response({reply.replica: reply.json() if reply.ok else reply.status for reply in replies})


def exits(replies: list[ReplicaReply]) -> Response[Any]:
    raise SystemExit("a secret")


def third_party(engine: Any, settings: Any) -> list[Any]:
    def value_route(path: str, **opt: Any) -> Any:
        @post(path, opt={"scope": "admin", "body": Body, **opt}, status_code=200)
        async def value(request: AnyRequest) -> Response[Any]:
            body = await read_body(request, Body)
            return json_response({"value": await engine.call("value") * body.factor, "name": current_replica.get()})

        return value

    @post("/typed", opt=ADMIN, status_code=200)
    async def typed(data: JSONBody[Body]) -> dict[str, Any]:
        return {"name": current_replica.get(), "factor": data.factor}

    @get("/text", opt=ADMIN, sync_to_thread=True)
    def text() -> Response[str]:
        return Response(f"I am {current_replica.get()}.", media_type=TEXT)

    @get("/text_sum", opt=ADMIN | {"replicas": "sum"}, sync_to_thread=False)
    def text_sum() -> Response[str]:
        return Response("I am no JSON.", media_type=TEXT)

    @get("/breaks", opt=ADMIN)
    async def breaks() -> Response[Any]:
        raise ZeroDivisionError("a secret")

    @get("/stream", opt=ADMIN | {"replies": {200: {SSE: int}}})
    async def stream() -> Response[Any]:
        async def frames() -> AsyncIterator[bytes]:
            await asyncio.Event().wait()
            yield b""

        def close() -> None:
            engine.closed += 1

        return EventStream(frames(), close)

    @get("/each", opt={"scope": "infer"})
    async def each() -> Response[Any]:
        return json_response([current_replica.get(), await on_each_replica(engine, lambda: engine.call("value"))])

    modes: dict[str, Any] = {
        "first": "first", "sum": "sum", "once": "once", "function": total_of, "exits": exits, "no_reply": lambda _: None
    }  # fmt: skip
    made = [value_route(f"/{name}", replicas=mode) for name, mode in modes.items()]
    return [value_route("/undeclared"), *made, typed, text, text_sum, breaks, stream, each]


@pytest.fixture(scope="module")
def made() -> tuple[Replicas, Any]:
    engine = Replicas()
    return engine, make_app(engine, third_party)


@pytest.fixture
def engine(made: tuple[Replicas, Any]) -> Replicas:
    made[0].reset()
    return made[0]


@pytest.fixture
async def http(made: tuple[Replicas, Any], engine: Replicas) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(made[1], client=("127.0.0.1", 5))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        yield client


async def ask(http: httpx.AsyncClient, path: str) -> tuple[int, Any]:
    answer = await http.post(path, json={"factor": 10})
    return answer.status_code, answer.json()


async def test_without_a_declaration_a_list_by_replica(http: httpx.AsyncClient, engine: Replicas) -> None:
    replies = [{"value": 10 * (index + 1), "name": name} for index, name in enumerate("abc")]
    status, listed = await ask(http, "/undeclared")
    expected = [{"replica": reply["name"], "status": 200, "reply": reply} for reply in replies]
    assert (status, listed) == (200, expected)
    engine.failing = {"c"}
    answer = await http.post("/undeclared", json={"factor": 10})
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "7")
    *good, bad = answer.json()
    assert good == expected[:2]
    assert (bad["replica"], bad["status"], bad["reply"]["message"]) == ("c", 503, "c is busy.")


async def test_each_kind_of_handler(http: httpx.AsyncClient) -> None:
    _, typed = await ask(http, "/typed")
    assert [entry["reply"] for entry in typed] == [{"name": name, "factor": 10} for name in "abc"]
    assert [entry["reply"] for entry in (await http.get("/text")).json()] == ["I am a.", "I am b.", "I am c."]


async def test_the_first_reply_or_the_first_error(http: httpx.AsyncClient, engine: Replicas) -> None:
    answer = await http.post("/first", json={"factor": 10})
    assert (answer.status_code, answer.json()) == (200, {"value": 10, "name": "a"})
    assert answer.headers["content-type"] == "application/json"
    assert "x-replica" not in answer.headers
    engine.failing = {"b", "c"}
    answer = await http.post("/first", json={"factor": 10})
    assert (answer.status_code, answer.json()["message"]) == (503, "b is busy.")
    assert (answer.headers["x-replica"], answer.headers["retry-after"]) == ("b", "7")


async def test_the_sum(http: httpx.AsyncClient, engine: Replicas) -> None:
    assert await ask(http, "/sum") == (200, {"value": 60, "name": "a"})
    engine.failing = {"b"}
    assert (await ask(http, "/sum"))[0] == 503
    assert (await http.get("/text_sum")).status_code == 500


def test_what_is_added_up() -> None:
    one = {"n": 1, "x": [1, {"y": 0.5}], "ok": True, "name": "a", "none": None}
    two = {"n": 2, "x": [3, {"y": 1}], "ok": False, "name": "b", "none": 4}
    assert added([one, two]) == {"n": 3, "x": [4, {"y": 1.5}], "ok": True, "name": "a", "none": None}
    others: list[Any] = [{"n": 1}, {**one, "x": [1]}, {**one, "n": [1]}, []]
    for other in others:
        with pytest.raises(ValueError, match="different shapes"):
            added([one, other])


async def test_a_function(http: httpx.AsyncClient, engine: Replicas) -> None:
    engine.failing = {"a"}
    status, merged = await ask(http, "/function")
    assert (status, merged["a"], merged["c"]["value"]) == (200, 503, 30)


@pytest.mark.parametrize(("path", "log"), [("/exits", "SystemExit: a secret"), ("/no_reply", "no Response: None")])
async def test_a_function_that_fails(
    http: httpx.AsyncClient, caplog: pytest.LogCaptureFixture, path: str, log: str
) -> None:
    answer = await http.post(path, json={"factor": 1})
    assert (answer.status_code, answer.text) == (500, "Internal Server Error")
    assert log in caplog.text
    assert "plugin 'strange'" in caplog.text


async def test_once_in_the_front(http: httpx.AsyncClient, engine: Replicas) -> None:
    assert await ask(http, "/once") == (200, {"value": 50, "name": None})
    assert (await http.get("/each")).json() == [None, {"a": 1, "b": 2, "c": 3}]
    assert current_replica.get() is None


async def test_errors_of_handlers_are_replies(http: httpx.AsyncClient) -> None:
    answer = await http.get("/breaks")
    assert answer.status_code == 500
    assert {entry["reply"] for entry in answer.json()} == {"Internal Server Error"}
    answer = await http.post("/first", json={"factor": "many"})
    assert (answer.status_code, answer.headers["x-replica"]) == (400, "a")
    assert "$.factor" in answer.json()["message"]


async def test_streams_are_refused_and_closed(http: httpx.AsyncClient, engine: Replicas) -> None:
    answer = await http.get("/stream")
    assert answer.status_code == 501
    assert '"replicas": "once"' in answer.json()["message"]
    assert engine.closed == 3


async def test_who_may_not_call_reaches_no_replica(made: tuple[Replicas, Any], engine: Replicas) -> None:
    transport = httpx.ASGITransport(made[1], client=("10.0.0.1", 5))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
        answer = await http.post("/undeclared", json={"factor": 1})
    assert answer.status_code == 403
    assert "local callers only" in answer.json()["error"]["message"]
    assert engine.calls == []


async def test_concurrent_requests_are_apart(http: httpx.AsyncClient) -> None:
    found = await asyncio.gather(*(ask(http, path) for path in ("/undeclared", "/once", "/first", "/sum") * 5))
    names = [[entry["reply"]["name"] for entry in listed] for _, listed in found[::4]]
    assert names == [["a", "b", "c"]] * 5
    assert {one["name"] for _, one in found[1::4]} == {None}
    assert [one for _, one in found[3::4]] == [{"value": 60, "name": "a"}] * 5


async def test_replicas_come_and_go(http: httpx.AsyncClient, engine: Replicas) -> None:
    engine.replicas, engine.values["d"] = ("d",), 4
    assert [entry["replica"] for entry in (await ask(http, "/undeclared"))[1]] == ["d"]
    engine.replicas = ()
    assert await ask(http, "/undeclared") == (200, {"value": 50, "name": None})


async def test_on_one_machine_nothing_changes(made: tuple[Replicas, Any]) -> None:
    def handlers(app: Litestar) -> list[Any]:
        return [handler for route in app.routes for handler in getattr(route, "route_handlers", ())]

    assert any(handler.resolve_middleware() for handler in handlers(made[1]))
    alone = Replicas()
    alone.replicas = ()
    app = make_app(alone, third_party)
    assert not any(handler.resolve_middleware() for handler in handlers(app))
    [undeclared] = [handler for handler in handlers(app) if "/undeclared" in handler.paths and handler.opt]
    assert "replies" not in undeclared.opt


async def test_lists_are_described(http: httpx.AsyncClient) -> None:
    paths = (await http.get("/openapi.json")).json()["paths"]
    schema = paths["/undeclared"]["post"]["responses"]["200"]["content"]["application/json"]["schema"]
    assert schema == {"type": "array", "items": {"$ref": "#/components/schemas/ReplicaResult"}}


@pytest.mark.parametrize("wrong", ["frist", "", None, 3, ["first"], json_response])
def test_a_wrong_declaration_stops_the_start(wrong: Any) -> None:
    async def merge(replies: list[ReplicaReply]) -> Response[Any]:
        raise NotImplementedError

    @get("/odd", opt=ADMIN | {"replicas": merge if wrong is json_response else wrong})
    async def odd() -> None:
        raise NotImplementedError

    with pytest.raises(PluginError, match='GET /odd: replicas must be "once", "first", "all", "sum" or a function'):
        check_routes([("odd", odd)])


async def test_work_on_each_replica_waits_for_all() -> None:
    engine = Replicas()
    engine.failing = {"a"}
    with pytest.raises(RequestError, match="a is busy"):
        await on_each_replica(engine, lambda: engine.call("value"))
    assert [name for name, _ in engine.calls] == ["a", "b", "c"]
    with on_replica("c"):
        assert await on_each_replica(engine, lambda: engine.call("value")) == {"c": 3}
    alone = SimpleNamespace(replicas=())
    assert await on_each_replica(alone, lambda: engine.call("value")) == {"": 5}
