"""Offers to upgrade the connection are ignored: the request is answered in HTTP/1.1 (RFC 9110, section 7.8)."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.field

H2C = b"connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABkAAQCAAAAAAIAAAAA\r\n"
OFFERS = {
    "h2c": H2C,
    "websocket": b"Connection: keep-alive, Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n",
    "tls": b"upgrade: TLS/1.0\r\nconnection: upgrade\r\n",
    "two": b"upgrade: h2c\r\nupgrade: foo/2\r\nconnection: upgrade\r\n",
    "none": b"",
}


def echo(number: int, offer: bytes, *, chunked: bool = False, version: bytes = b"1.1") -> bytes:
    """A request that is answered with ``number``."""
    content = json.dumps({"ids": [number], "n": 1}).encode()
    head = b"POST /echo HTTP/%s\r\nhost: x\r\ncontent-type: application/json\r\n%s" % (version, offer)
    if chunked:
        middle = b"%x;a=b\r\n%s\r\n%x\r\n%s\r\n" % (4, content[:4], len(content) - 4, content[4:])
        return head + b"transfer-encoding: chunked\r\n\r\n" + middle + b"0\r\nx-trailer: a\r\n\r\n"
    return head + b"content-length: %d\r\n\r\n" % len(content) + content


PING = b"GET /ping HTTP/1.1\r\nhost: x\r\n%s\r\n"
LAST = b"GET /ping HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"


async def talk(port: int, *pieces: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for piece in pieces:
        writer.write(piece)
        await writer.drain()
        await asyncio.sleep(0)
    answer = await asyncio.wait_for(reader.read(), 20)
    writer.close()
    return answer


@pytest.mark.parametrize("name", OFFERS)
@pytest.mark.parametrize("chunked", [False, True])
async def test_a_request_with_an_offer_keeps_its_body(live: Callable[..., Any], name: str, chunked: bool) -> None:
    _, port = await live()
    offer = OFFERS[name]
    request = echo(7, offer, chunked=chunked)
    middle = len(request) - 9
    requests = [PING % offer, request, echo(8, b""), PING % offer, request]
    whole = await talk(port, b"".join(requests) + LAST)
    assert whole.count(b"HTTP/1.1 200 OK") == 6
    assert whole.count(b"[7]") == 2
    assert whole.count(b"[8]") == 1
    split = await talk(port, request[:middle], request[middle:], LAST)
    assert split.count(b"HTTP/1.1 200 OK") == 2
    assert b"[7]" in split


async def test_an_offer_in_http_1_0_is_ignored_too(live: Callable[..., Any]) -> None:
    _, port = await live()
    answer = await talk(port, echo(7, H2C, version=b"1.0"))
    assert b"[7]" in answer
    assert answer.count(b"HTTP/1.1 200") == 1


async def test_an_offer_on_a_route_that_is_not_there_is_404(live: Callable[..., Any]) -> None:
    _, port = await live()
    answer = await talk(port, (PING % OFFERS["websocket"]).replace(b"/ping", b"/ws") + LAST)
    assert [part[:3] for part in answer.split(b"HTTP/1.1 ")[1:]] == [b"404", b"200"]


requests = st.tuples(st.sampled_from(sorted(OFFERS)), st.booleans())


async def test_any_pipeline_in_any_pieces_is_answered_in_order(live: Callable[..., Any]) -> None:
    _, port = await live()
    loop = asyncio.get_running_loop()

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(requests, min_size=1, max_size=8), st.lists(st.integers(1, 400), max_size=30))
    def check(plan: list[tuple[str, bool]], cuts: list[int]) -> None:
        stream = b"".join(echo(index, OFFERS[name], chunked=chunked) for index, (name, chunked) in enumerate(plan))
        pieces = []
        for cut in cuts:
            pieces.append(stream[:cut])
            stream = stream[cut:]
        answer = asyncio.run_coroutine_threadsafe(talk(port, *pieces, stream + LAST), loop).result(30)
        found = [part.split(b'"ids":[')[1].split(b"]")[0] for part in answer.split(b"HTTP/1.1 200 OK")[1:-1]]
        assert found == [b"%d" % index for index in range(len(plan))]

    await asyncio.to_thread(check)
