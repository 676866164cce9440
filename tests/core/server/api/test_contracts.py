"""Route handlers of plugins that exit or return something else than they say."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from litestar import Response, get
from msgspec import Struct

from trunkline.core.config import Config
from trunkline.core.discovery import Plugin
from trunkline.core.errors import PluginError, RequestError
from trunkline.core.host import Host
from trunkline.core.server.api import EventStream
from trunkline.core.server.api.body_limits import run_here
from trunkline.core.server.app import create_app

pytestmark = pytest.mark.field

OPEN = {"scope": "public"}


class Count(Struct):
    count: int


def routes() -> list[Any]:
    @get("/fine", opt=OPEN)
    async def fine() -> Count:
        return Count(1)

    @get("/fine_in_a_thread", opt=OPEN, sync_to_thread=True)
    def fine_in_a_thread() -> Count:
        return Count(2)

    @get("/exits", opt=OPEN)
    async def exits() -> Count:
        raise SystemExit("a secret")

    @get("/exits_in_a_thread", opt=OPEN, sync_to_thread=True)
    def exits_in_a_thread() -> Count:
        raise KeyboardInterrupt

    @get("/raises", opt=OPEN)
    async def raises() -> Count:
        raise ValueError("a secret")

    @get("/refuses", opt=OPEN)
    async def refuses() -> Count:
        raise RequestError("not today", status=409)

    @get("/nothing", opt=OPEN)
    async def nothing() -> Count:
        return None  # type: ignore[return-value]

    @get("/another_type", opt=OPEN)
    async def another_type() -> Count:
        return Count("many")  # type: ignore[arg-type]

    @get("/unwritable", opt=OPEN)
    async def unwritable() -> dict[str, Any]:
        return {"a": object()}

    @get("/stream", opt=OPEN)
    async def stream() -> Response[Any]:
        async def frames() -> AsyncIterator[bytes]:
            yield b"data: 1\n\n"
            raise SystemExit("a secret")

        return EventStream(frames(), lambda: None)

    return [
        fine, fine_in_a_thread, exits, exits_in_a_thread, raises, refuses, nothing, another_type, unwritable, stream
    ]  # fmt: skip


def build(plugin: Callable[..., Plugin], make: Callable[[], list[Any]]) -> Any:
    found = plugin("noisy", trunkline_routes=make)
    found.distribution, found.version = "noisy-dist", "3.1"
    host = Host([found])
    return create_app(host, SimpleNamespace(models=[], replicas=(), off_loop=run_here), Config.load({}, host).settings)


@pytest.fixture
async def http(plugin: Callable[..., Plugin], listen: Callable[..., Any]) -> AsyncIterator[httpx.AsyncClient]:
    port = await listen(build(plugin, routes))
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
        yield client
        assert (await client.get("/fine")).json() == {"count": 1}
        assert (await client.get("/fine_in_a_thread")).json() == {"count": 2}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("exits", "raised SystemExit"),
        ("exits_in_a_thread", "raised KeyboardInterrupt"),
        ("raises", "ValueError"),
        ("nothing", "returned what is not a Count"),
        ("another_type", "returned what is not a Count"),
        ("unwritable", "SerializationException"),
    ],
)
async def test_the_request_fails_and_the_log_names_the_handler(
    http: httpx.AsyncClient, caplog: pytest.LogCaptureFixture, name: str, words: str
) -> None:
    answer = await http.get(f"/{name}")
    assert answer.status_code == 500
    assert "secret" not in answer.text
    (line,) = [record.getMessage() for record in caplog.records if "unhandled error" in record.getMessage()]
    assert f"/{name} (plugin 'noisy' (noisy-dist 3.1), handler {name}): " in line
    assert words in line


async def test_a_request_error_is_the_client_s(http: httpx.AsyncClient) -> None:
    assert (await http.get("/refuses")).status_code == 409


async def test_a_stream_that_exits_ends_with_an_error_frame(
    http: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    answer = await http.get("/stream")
    assert answer.text.startswith("data: 1\n\n")
    assert "Internal Server Error" in answer.text
    assert answer.text.endswith("data: [DONE]\n\n")
    assert "a stream failed (plugin 'noisy' (noisy-dist 3.1), handler stream): SystemExit" in caplog.text


async def test_a_handler_is_cancelled_as_ever(plugin: Callable[..., Plugin]) -> None:
    ended: list[str] = []

    @get("/waits", opt=OPEN)
    async def waits() -> Count:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise
        return Count(1)

    app = build(plugin, lambda: [waits])
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await client.get("/waits")
    assert ended == ["cancelled"]


def test_a_handler_that_does_not_say_what_it_returns_is_named(plugin: Callable[..., Plugin]) -> None:
    @get("/vague", opt=OPEN)
    async def vague():  # type: ignore[no-untyped-def]
        return 1

    with pytest.raises(
        PluginError, match=r"plugin 'noisy' \(noisy-dist 3.1\): handler vague doesn't say what it returns"
    ):
        build(plugin, lambda: [vague])
