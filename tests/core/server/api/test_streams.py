"""Streams, clients that hang up, clients that never read."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import psutil
import pytest

from trunkline.core.errors import RequestError
from trunkline.core.server.api import DONE, error_frame, wait_for_all
from trunkline.core.server.api.bodies import ClientGone
from trunkline.core.server.api.streams import until_gone


def raw(path: str, body: dict[str, Any], *headers: str) -> bytes:
    content = json.dumps(body).encode()
    head = [f"POST {path} HTTP/1.1", "host: localhost", "content-type: application/json", *headers]
    return "\r\n".join([*head, f"content-length: {len(content)}", "", ""]).encode() + content


def connect(port: int, receive_buffer: int = 0) -> socket.socket:
    sock = socket.socket()
    if receive_buffer:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    sock.connect(("127.0.0.1", port))
    return sock


async def until(condition: Callable[[], bool], seconds: float = 30) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


async def test_a_stream_is_frames_then_done(live: Callable[..., Any]) -> None:
    _, port = await live()
    body = {"ids": [4, 5, 6], "n": 3, "delay": 0.02, "stream": True, "rid": "s"}
    async with httpx.AsyncClient() as http:
        answer = await http.post(f"http://127.0.0.1:{port}/echo", json=body)
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["x-request-id"] == "s"
    frames = answer.text.split("\n\n")
    assert frames[-2:] == ["data: [DONE]", ""]
    steps = [json.loads(frame.removeprefix("data: ")) for frame in frames[:-2]]
    assert steps[-1] == {"ids": [4, 5, 6], "finish": {"type": "length", "length": 3}, "pad": ""}
    assert [len(step["ids"]) for step in steps] == sorted({len(step["ids"]) for step in steps})


@pytest.mark.parametrize("path", ["/echo", "/v1/echo"])
async def test_an_error_in_a_stream_is_a_frame(live: Callable[..., Any], path: str) -> None:
    _, port = await live()
    body = {"ids": [4], "refuse": True, "stream": True}
    async with httpx.AsyncClient() as http:
        answer = await http.post(f"http://127.0.0.1:{port}{path}", json=body)
    assert answer.status_code == 200
    assert answer.content == error_frame(RequestError("refused", param="text"), "native") + DONE
    assert json.loads(answer.text.split("\n\n")[0].removeprefix("data: "))["error"]["message"] == "refused"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("queue", [0.0, 30.0])
async def test_a_client_that_hangs_up_is_aborted(live: Callable[..., Any], stream: bool, queue: float) -> None:
    engine, port = await live()
    sock = connect(port)
    sock.sendall(raw("/echo", {"ids": [1], "n": 100_000, "delay": 0.005, "stream": stream, "queue": queue}))
    await until(lambda: len(engine._live) == 1 and (queue > 0 or engine.status.results > 2))
    sock.close()
    await until(lambda: len(engine._live) == 0, 5)
    assert await engine.call("aborted") == 1


async def test_hanging_up_cancels_all_of_a_batch(live: Callable[..., Any]) -> None:
    engine, port = await live()
    sock = connect(port)
    sock.sendall(raw("/echo", {"ids": [1], "n": 100_000, "delay": 0.005, "copies": 5}))
    await until(lambda: len(engine._live) == 5 and engine.status.results > 5)
    sock.close()
    await until(lambda: len(engine._live) == 0, 5)
    assert await engine.call("aborted") == 5


async def test_hanging_up_in_the_middle_of_a_body_harms_nobody(live: Callable[..., Any]) -> None:
    engine, port = await live()
    sock = connect(port)
    sock.sendall(raw("/echo", {"ids": [1]})[:-5])
    await asyncio.sleep(0.1)
    sock.close()
    await asyncio.sleep(0.1)
    async with httpx.AsyncClient() as http:
        assert (await http.post(f"http://127.0.0.1:{port}/echo", json={"ids": [1]})).status_code == 200
    assert len(engine._live) == 0


async def test_one_failure_cancels_the_rest_of_a_batch() -> None:
    class Fake:
        def __init__(self, error: Exception | None) -> None:
            self.error, self.cancelled = error, 0

        async def result(self) -> None:
            if self.error:
                raise self.error
            await asyncio.sleep(60)

        def cancel(self) -> None:
            self.cancelled += 1

    replies = [Fake(None), Fake(RequestError("no"))]
    with pytest.raises(RequestError, match="no"):
        await wait_for_all(replies)  # type: ignore[arg-type]
    assert [reply.cancelled for reply in replies] == [1, 1]


async def test_until_gone_tells_hanging_up_from_cancellation() -> None:
    async def gone() -> Any:
        return {"type": "http.disconnect"}

    with pytest.raises(ClientGone):
        async with until_gone(gone):
            await asyncio.sleep(60)
    await asyncio.sleep(0)  # no cancellation is left over

    async def never() -> Any:
        await asyncio.sleep(60)

    async def work() -> None:
        async with until_gone(never):
            await asyncio.sleep(60)

    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_an_unread_stream_is_dropped_after_its_timeout(live: Callable[..., Any]) -> None:
    engine, port = await live(stream_timeout=0.5)
    with connect(port, 4096) as sock:
        sock.sendall(raw("/echo", {"ids": [1], "n": 100_000, "delay": 0.001, "stream": True, "pad": 200_000}))
        await until(lambda: engine.status.results > 0)
        await until(lambda: len(engine._live) == 0, 20)
    assert await engine.call("aborted") == 1


async def test_a_slow_reader_gets_fewer_and_longer_steps(live: Callable[..., Any]) -> None:
    _, port = await live()
    body = {"ids": [7], "n": 400, "delay": 0.002, "stream": True, "pad": 300_000}
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=4096)
    writer.write(raw("/echo", body, "connection: close"))
    received = bytearray()
    while piece := await reader.read(1 << 20):
        received += piece
        if len(received) < 4 << 20:
            await asyncio.sleep(0.005)
    writer.close()
    frames = [line for line in received.split(b"\n") if line.startswith(b"data: {")]
    assert len(frames) < 400
    assert json.loads(frames[-1].removeprefix(b"data: "))["ids"] == [7] * 400


async def test_clients_that_never_read_cost_bounded_memory(live: Callable[..., Any]) -> None:
    """100 streams of 200 MB each, unread: what is buffered is a few frames each, and others are served."""
    engine, port = await live()
    sockets = [connect(port, 4096) for _ in range(100)]
    body = {"ids": [1], "n": 2000, "delay": 0.005, "stream": True, "pad": 100_000}
    me = psutil.Process()
    before = me.memory_info().rss
    for sock in sockets:
        sock.sendall(raw("/echo", body))
    await until(lambda: len(engine._live) == 100)
    start = engine.status.results
    await until(lambda: engine.status.results > start + 20_000, 120)
    async with httpx.AsyncClient(timeout=30) as http:
        assert (await http.post(f"http://127.0.0.1:{port}/echo", json={"ids": [1]})).status_code == 200
    assert me.memory_info().rss - before < 100 << 20
    for sock in sockets:
        sock.close()
    await until(lambda: len(engine._live) == 0)


async def test_on_close_runs_once_however_a_stream_ends(live: Callable[..., Any]) -> None:
    from trunkline.core.server.api import EventStream

    async def run(frames: AsyncIterator[bytes], receive: Any, send: Any) -> int:
        closed: list[int] = []
        request: Any = type("R", (), {"scope": {}, "app": type("A", (), {"state": {}})})
        stream = EventStream(frames, lambda: closed.append(1)).to_asgi_response(None, request)
        await asyncio.gather(stream({}, receive, send), return_exceptions=True)  # type: ignore[arg-type]
        return len(closed)

    async def forever() -> AsyncIterator[bytes]:
        while True:
            yield b"x"
            await asyncio.sleep(0)

    async def two() -> AsyncIterator[bytes]:
        yield b"x"
        yield b"y"

    async def broken() -> AsyncIterator[bytes]:
        yield b"x"
        raise ZeroDivisionError

    async def stay() -> Any:
        await asyncio.sleep(60)

    async def leave() -> Any:
        return {"type": "http.disconnect"}

    async def take(_: Any) -> None: ...

    async def refuse(_: Any) -> None:
        raise OSError("no socket")

    assert await run(two(), stay, take) == 1
    assert await run(broken(), stay, take) == 1
    assert await run(forever(), leave, take) == 1
    assert await run(two(), stay, refuse) == 1
