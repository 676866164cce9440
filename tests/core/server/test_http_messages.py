"""Every part of an HTTP message has a limit, and what can't be read hurts no other request. Over raw sockets."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest

from trunkline.core.logs import RateLimited
from trunkline.core.server import http_protocol

pytestmark = pytest.mark.field

PING = b"GET /ping HTTP/1.1\r\nhost: x\r\n\r\n"
LAST = b"GET /ping HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
ECHO = b"POST /echo HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
CHUNKED = ECHO + b"transfer-encoding: chunked\r\n\r\n"
CONTENT = b'{"ids": [7], "n": 1}'
SIZED = ECHO + b"content-length: %d\r\n\r\n" % len(CONTENT) + CONTENT
Talk = Callable[..., Any]


@asynccontextmanager
async def connect(port: int) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


@pytest.fixture
async def talk(live: Callable[..., Any]) -> Talk:
    """``await talk(*pieces, **server settings)``: all that comes back until the connection ends."""
    ports: dict[tuple[Any, ...], int] = {}

    async def make(*pieces: bytes, pause: float = 0.02, **settings: Any) -> bytes:
        key = tuple(settings.items())
        if key not in ports:
            ports[key] = (await live(**settings))[1]
        answer = b""
        async with connect(ports[key]) as (reader, writer):
            with suppress(ConnectionError):
                for piece in pieces:
                    writer.write(piece)
                    await asyncio.sleep(pause)
                while block := await asyncio.wait_for(reader.read(1 << 16), 10):
                    answer += block
        return answer

    return make


def statuses(answer: bytes) -> list[int]:
    return [int(part[:3]) for part in answer.split(b"HTTP/1.1 ")[1:]]


# -- RFC 9112, section 3.2 -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"GET /ping HTTP/1.1\r\n", 400),
        (b"GET /ping HTTP/1.1\r\nupgrade: h2c\r\nconnection: upgrade\r\n", 400),
        (b"GET /ping HTTP/1.1\r\nhost: a\r\nHost: a\r\n", 400),
        (b"GET /ping HTTP/1.0\r\nhost: a\r\nhost: b\r\n", 400),
        (b"GET /ping HTTP/1.0\r\n", 200),
        (b"GET /ping HTTP/1.1\r\nconnection: close\r\nHOST:\r\n", 200),
        (b"GET http://a/ping HTTP/1.1\r\nconnection: close\r\nhost: a\r\n", 200),
    ],
)
async def test_a_request_has_one_host_header(talk: Talk, head: bytes, status: int) -> None:
    assert statuses(await talk(PING + head + b"\r\n")) == [200, status]


# -- limits ----------------------------------------------------------------------------------


async def test_trailers_are_read_and_dropped(talk: Talk) -> None:
    body = CHUNKED + b"%x\r\n%s\r\n0\r\n" % (len(CONTENT), CONTENT)
    trailers = b"x-request-id: mine\r\n" * 10
    answer = await talk(body + trailers + b"\r\n" + LAST)
    assert statuses(answer) == [200, 200]
    assert b"mine" not in answer


@pytest.mark.parametrize(("trailer", "status"), [(b"x-1: a\r\n", 431), (b"a" * 700, 400)], ids=["many", "one"])
async def test_endless_trailers_are_refused(talk: Talk, trailer: bytes, status: int) -> None:
    start = CHUNKED + b"%x\r\n%s\r\n0\r\n" % (len(CONTENT), CONTENT)
    assert statuses(await talk(start, *[trailer * 100] * 40)) == [status]


@pytest.mark.parametrize("framing", [b"a" * 4000, b"0" * 4000 + b"1;a=b\r\nx\r\n"], ids=["one", "each chunk's"])
async def test_long_chunk_extensions_are_refused(talk: Talk, framing: bytes) -> None:
    start = CHUNKED + (b"1;x=" if framing[:1] == b"a" else b"")
    assert statuses(await talk(start, *[framing] * 40)) == [400]


@pytest.mark.parametrize(("count", "answers"), [(20_000, [200, 200]), (60_000, [400])])
async def test_a_body_may_come_in_a_bounded_number_of_tiny_chunks(talk: Talk, count: int, answers: list[int]) -> None:
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in CONTENT[:-1] + b" " * count + b"}")
    pieces = [chunks[start : start + 20_000] for start in range(0, len(chunks), 20_000)]
    assert statuses(await talk(CHUNKED, *pieces, b"0\r\n\r\n" + LAST, pause=0)) == answers


async def test_a_large_body_may_come_in_chunks_of_a_usual_size(talk: Talk) -> None:
    content = CONTENT[:-1] + b" " * 1_000_000 + b"}"
    chunks = b"".join(b"40\r\n%s\r\n" % content[start : start + 64].ljust(64) for start in range(0, len(content), 64))
    assert statuses(await talk(CHUNKED + chunks + b"0\r\n\r\n" + LAST)) == [200, 200]


@pytest.mark.parametrize("count", [http_protocol.MAX_HEADERS - 2, http_protocol.MAX_HEADERS])
async def test_the_number_of_headers_is_limited(talk: Talk, count: int) -> None:
    answer = await talk(LAST[:-2] + b"a:\r\n" * count + b"\r\n")
    assert statuses(answer) == [200 if count < http_protocol.MAX_HEADERS - 1 else 431]


async def test_empty_lines_between_requests_are_limited(talk: Talk) -> None:
    assert statuses(await talk(PING + b"\r\n\r\n" + LAST)) == [200, 200]
    assert statuses(await talk(PING, *[b"\r\n" * 4000] * 4)) == [200, 431]


async def test_empty_lines_do_not_keep_a_connection(live: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "KEEP_ALIVE_SECONDS", 1)
    _, port = await live()
    async with connect(port) as (reader, writer):
        writer.write(PING)
        ended = asyncio.create_task(reader.read())
        async with asyncio.timeout(20):
            while not ended.done():
                writer.write(b"\r\n")
                await asyncio.sleep(0.1)
        assert statuses(ended.result()) == [200]


async def test_a_head_may_begin_before_the_last_answer(live: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "KEEP_ALIVE_SECONDS", 1)
    _, port = await live()
    slow = CONTENT[:-1] + b', "delay": 2}'
    request = ECHO + b"content-length: %d\r\n\r\n" % len(slow) + slow
    async with connect(port) as (reader, writer):
        writer.write(PING + request[:20])
        await reader.readuntil(b"\r\n\r\n")
        writer.write(request[20:] + LAST)
        assert statuses(await asyncio.wait_for(reader.read(), 10)) == [200, 200]


async def test_the_number_of_pipelined_requests_is_limited(talk: Talk) -> None:
    slow = CONTENT[:-1] + b', "delay": 0.5}'
    first = ECHO + b"content-length: %d\r\n\r\n" % len(slow) + slow
    assert statuses(await talk(first + PING * 1000)) == [200] * (1 + http_protocol.MAX_PIPELINED) + [503]


async def test_what_is_left_of_a_refused_body_is_read_for_a_while(live: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that writes all of its body before it reads gets the answer; one that never ends is cut off."""
    monkeypatch.setattr(http_protocol, "KEEP_ALIVE_SECONDS", 1)
    _, port = await live(max_body_bytes=1000)
    async with connect(port) as (reader, writer):
        writer.write(ECHO + b"content-length: 3000000\r\n\r\n" + b"a" * 3_000_000 + LAST)
        assert statuses(await asyncio.wait_for(reader.read(), 10)) == [413, 200]
    async with connect(port) as (reader, writer):
        writer.write(CHUNKED)
        ended = asyncio.create_task(reader.read())
        async with asyncio.timeout(20):
            while not ended.done():
                writer.write(b"400\r\n" + b"a" * 0x400 + b"\r\n")
                await asyncio.sleep(0.01)
        assert ended.exception() or statuses(ended.result()) == [413]


async def test_a_body_must_arrive_at_a_certain_rate(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each byte within ``--stream-timeout`` of the one before isn't enough."""
    monkeypatch.setattr(http_protocol, "KEEP_ALIVE_SECONDS", 1)
    drops = [b"1\r\n \r\n"] * 10
    assert statuses(await talk(CHUNKED, *drops, pause=0.1, stream_timeout=0.5)) == [408]


# -- what can't be read ----------------------------------------------------------------------


@pytest.mark.parametrize("garbage", [b"\x16\x03\x01\x02\x00", b"GET\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"])
async def test_garbage_behind_a_request_leaves_its_answer_alone(talk: Talk, garbage: bytes) -> None:
    slow = CONTENT[:-1] + b', "delay": 0.2}'
    request = ECHO + b"content-length: %d\r\n\r\n" % len(slow) + slow
    for pieces in ([request + garbage], [request, garbage], [request + PING * 2 + garbage]):
        answer = await talk(*pieces)
        assert statuses(answer) == [200] * (1 + pieces[0].count(PING)) + [400]
        assert b"[7]" in answer


async def test_a_request_with_a_broken_body_is_400_once(talk: Talk, caplog: pytest.LogCaptureFixture) -> None:
    broken = CHUNKED + b"zz\r\n{}\r\n"
    assert statuses(await talk(broken)) == [400]
    assert statuses(await talk(CHUNKED, b"2\r\n{}", b"garbage")) == [400]
    assert statuses(await talk(SIZED + broken)) == [200, 400]
    assert "Traceback" not in caplog.text


async def test_a_body_that_breaks_after_its_answer_gets_no_second_one(talk: Talk) -> None:
    unknown = CHUNKED.replace(b"/echo", b"/nothing")
    assert statuses(await talk(unknown, b"1\r\n \r\n", b"zz")) == [404]


@pytest.mark.parametrize("target", [b"example.com:443", b"/ping"])
async def test_connect_is_refused(talk: Talk, target: bytes) -> None:
    assert statuses(await talk(b"CONNECT %s HTTP/1.1\r\nhost: x\r\n\r\n" % target)) == [405]


async def test_a_slow_head_behind_a_request_leaves_its_answer_alone(live: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "HEAD_SECONDS", 0.2)
    _, port = await live()
    slow = CONTENT[:-1] + b', "delay": 1}'
    async with connect(port) as (reader, writer):
        writer.write(ECHO + b"content-length: %d\r\n\r\n" % len(slow) + slow + b"GET /pi")
        assert statuses(await asyncio.wait_for(reader.read(), 10)) == [200, 408]


async def test_a_client_that_hangs_up_behind_pipelined_requests_frees_the_first(live: Any) -> None:
    engine, port = await live()
    endless = CONTENT[:-1].replace(b'"n": 1', b'"n": 100000') + b', "delay": 0.01}'
    request = ECHO + b"content-length: %d\r\n\r\n" % len(endless) + endless
    async with connect(port) as (_, writer):
        writer.write(request + PING * 3)
        while not len(engine._live):
            await asyncio.sleep(0.01)
    async with asyncio.timeout(10):
        while len(engine._live):
            await asyncio.sleep(0.01)


async def test_lost_connections_leave_no_traceback(live: Any, caplog: pytest.LogCaptureFixture) -> None:
    engine, port = await live()
    slow = CONTENT[:-1] + b', "delay": 0.1, "n": 3, "pad": 100000%s}'
    for extra in (b"", b', "stream": true'):
        content = slow % extra
        request = ECHO + b"content-length: %d\r\n\r\n" % len(content) + content
        for sent in (request[:-5], request, request + PING, request * 3, request + b"\x00", CHUNKED + b"5\r\n"):
            for wait in (0, 0.05, 0.15):
                async with connect(port) as (_, writer):
                    writer.write(sent)
                    await asyncio.sleep(wait)
    async with asyncio.timeout(10):
        while len(engine._live):
            await asyncio.sleep(0.01)
    assert [record.message for record in caplog.records if record.exc_info or record.name == "asyncio"] == []


async def test_bad_requests_are_logged_now_and_then(
    talk: Talk, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = RateLimited(logging.getLogger("trunkline.server"), logging.WARNING, seconds=1000)
    monkeypatch.setattr(http_protocol, "bad_requests", lines)
    for _ in range(5):
        await talk(b"\x16\x03\x01", pause=0)
    assert [record.message for record in caplog.records if "bad request" in record.message] == [
        "bad request from 127.0.0.1: Invalid HTTP request received."
    ]
