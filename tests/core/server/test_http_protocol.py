"""Limits of a connection, over raw sockets."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from trunkline.core.server import http_protocol


async def talk(port: int, *pieces: bytes, pause: float = 0.02) -> bytes:
    """Send the pieces one after another; everything that comes back until the connection ends."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(pause)
        return await asyncio.wait_for(reader.read(), 10)
    except ConnectionError:
        return b""
    finally:
        writer.close()


@pytest.fixture
async def port(live: Callable[..., Any]) -> int:
    _, port = await live()
    return int(port)


async def test_a_head_of_16_kib_is_refused(port: int) -> None:
    long = b"GET /ping HTTP/1.1\r\nhost: x\r\nconnection: close\r\nx-long: " + b"a" * http_protocol.MAX_HEAD
    whole = await talk(port, long + b"\r\n\r\n")
    assert whole.startswith(b"HTTP/1.1 431")
    fine = long[: -http_protocol.MAX_HEAD // 2] + b"\r\n\r\n"
    assert (await talk(port, fine)).startswith(b"HTTP/1.1 200")


async def test_an_endless_head_is_cut_off(port: int) -> None:
    chunk = b"a" * 4000
    answer = await talk(port, b"GET /ping HTTP/1.1\r\nhost: x\r\nx-long: ", *[chunk] * 6)
    assert b" 200 " not in answer
    url = await talk(port, b"GET /", *[chunk] * 6)
    assert b" 200 " not in url


async def test_pipelined_requests_are_counted_apart(port: int) -> None:
    one = b"GET /ping HTTP/1.1\r\nhost: x\r\nx-pad: " + b"a" * 1000 + b"\r\n\r\n"
    last = b"GET /ping HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
    answer = await talk(port, one * 30 + last[:20], last[20:])
    assert answer.count(b"HTTP/1.1 200") == 31


async def test_a_connection_that_says_nothing_is_closed(
    live: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_protocol, "HEAD_SECONDS", 0.2)
    _, port = await live()
    assert await talk(port) == b""
    assert (await talk(port, b"GET /ping HT")).startswith(b"HTTP/1.1 408")
    answered_then_idle = await talk(port, b"GET /ping HTTP/1.1\r\nhost: x\r\n\r\nGET /pi")
    assert answered_then_idle.count(b"HTTP/1.1 200") == 1


async def test_a_body_that_stops_arriving_is_408(live: Callable[..., Any]) -> None:
    _, port = await live(stream_timeout=0.3)
    head = b"POST /echo HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\n"
    head += b"content-length: 99\r\n\r\n"
    assert (await talk(port, head, b'{"ids"')).startswith(b"HTTP/1.1 408")


async def test_nonsense_is_400(port: int) -> None:
    assert (await talk(port, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n")).startswith(b"HTTP/1.1 400")


@pytest.mark.parametrize("reads", [False, True])
async def test_a_closing_connection_lasts_while_its_client_reads(
    live: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, reads: bool
) -> None:
    monkeypatch.setattr(http_protocol, "FLUSH_SECONDS", 0.3)
    _, port = await live()
    content = b'{"ids": [1], "n": 1, "pad": 20000000}'
    head = b"POST /echo HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(head + b"content-length: %d\r\n\r\n" % len(content) + content)
    received = 0
    await asyncio.sleep(0 if reads else 1.5)
    try:
        while piece := await reader.read(1 << 18):
            received += len(piece)
            await asyncio.sleep(0.01)
    except ConnectionError:
        pass
    writer.close()
    assert (received > 20_000_000) == reads
