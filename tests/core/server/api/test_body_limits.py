"""What bodies may cost: values in one, bytes of all, and time on the event loop."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from typing import Any

import httpx
import msgspec
import pytest
from msgspec import Struct

from trunkline.core.errors import RequestError
from trunkline.core.memory import give_memory_back
from trunkline.core.server.api.body_limits import LARGE_BODY, MAX_ITEMS, MAX_NODES, SMALL_BODY, BodyLimits, InvalidBody
from trunkline.core.settings import ServerSettings

pytestmark = pytest.mark.field


class Body(Struct):
    values: Any = None


async def decode(content: bytes, **server: Any) -> Any:
    return (await BodyLimits(ServerSettings(**server)).decode(content, Body)).values


@pytest.mark.parametrize(
    ("values", "fits"),
    [
        (b"[" + b"1," * (MAX_ITEMS - 1) + b"1]", True),
        (b"[" + b"1," * (MAX_ITEMS + 1) + b"1]", False),
        (b"[" + b"[1]," * (MAX_NODES - 5) + b"1]", True),
        (b"[" + b"[1]," * MAX_NODES + b"1]", False),
        (b"[" + b"{}," * MAX_NODES + b"1]", False),
        (b"{" + b",".join(b'"%d":1' % key for key in range(MAX_NODES - 5)) + b"}", True),
        (b"{" + b",".join(b'"%d":1' % key for key in range(MAX_NODES)) + b"}", False),
        (b"[" + b'"",' * (MAX_NODES - 5) + b"1]", True),
        (b"[" + b'"",' * MAX_NODES + b"1]", False),
        (b'["' + b"[{,:" * MAX_NODES + b'"]', True),  # in a text, none of them counts
        (b'["\\"' + b"[{,:" * MAX_NODES + b'\\\\", "' + b"],:" * MAX_NODES + b'"]', True),
    ],
)
async def test_the_values_of_a_body_are_counted_before_it_is_decoded(values: bytes, fits: bool) -> None:
    content = b'{"values": ' + values + b"}"
    if fits:
        assert await decode(content) == json.loads(values)
        return
    values_of_it = rf"{MAX_ITEMS + 1} values; at most {MAX_ITEMS} are"
    nodes_of_it = rf"\d+ arrays, objects and strings; at most {MAX_NODES} are"
    with pytest.raises(InvalidBody, match=rf"^The body has ({values_of_it}|{nodes_of_it}) allowed\. Split") as caught:
        await decode(content)
    assert "or raise --max-body-bytes" not in caught.value.message  # the body is far below it
    assert await decode(content, max_body_bytes=100 << 20) == json.loads(values)


async def test_a_batch_of_a_million_token_ids_is_decoded() -> None:
    """Bodies of 1024 prompts of 1000 ids are within every other limit."""
    content = b'{"values": [' + b",".join([b"[" + b",".join([b"12345"] * 1000) + b"]"] * 1024) + b"]}"
    assert len(content) < ServerSettings().max_body_bytes
    assert await decode(content) == [[12345] * 1000] * 1024


async def test_a_large_body_that_is_nested_too_deeply_is_refused() -> None:
    with pytest.raises(InvalidBody, match="nested too deeply"):
        await decode(b'{"values": "' + b"a" * SMALL_BODY + b'", "other": ' + b"[" * 100 + b"]" * 100 + b"}")


@pytest.mark.parametrize(("size", "here"), [(SMALL_BODY, True), (SMALL_BODY + 1, False)])
async def test_large_bodies_are_decoded_in_a_thread(monkeypatch: pytest.MonkeyPatch, size: int, here: bool) -> None:
    threads = []
    original = msgspec.json.decode

    def watched(*args: Any, **kwargs: Any) -> Any:
        threads.append(threading.current_thread())
        return original(*args, **kwargs)

    async def off_loop(function: Callable[..., Any], *args: Any, size: int = 0) -> Any:
        assert size > SMALL_BODY
        return await asyncio.to_thread(function, *args)

    monkeypatch.setattr(msgspec.json, "decode", watched)
    content = b'{"values": 5}' + b" " * (size - 13)
    assert (await BodyLimits(ServerSettings(), off_loop).decode(content, Body)).values == 5
    assert [thread is threading.current_thread() for thread in threads] == [here]


async def test_bytes_are_held_until_the_request_is_answered() -> None:
    limits = BodyLimits(ServerSettings(max_held_body_bytes=300_000, max_body_bytes=100_000))
    answered = asyncio.Event()

    async def request(size: int) -> None:
        limits.account()(size)
        await answered.wait()

    held = [asyncio.create_task(request(100_000)) for _ in range(3)]
    await asyncio.sleep(0)
    assert limits.held == 300_000
    with pytest.raises(RequestError, match=r"300000 bytes, .* limit of 300000 \(--max-held-body-bytes\)") as caught:
        await asyncio.create_task(request(100_000))
    assert (caught.value.status, caught.value.retry_after) == (503, 1.0)
    small = asyncio.create_task(request(SMALL_BODY))
    await asyncio.sleep(0)
    assert limits.held == 300_000 + SMALL_BODY
    held[0].cancel()
    await asyncio.wait(held[:1])
    answered.set()
    await asyncio.gather(small, *held[1:])
    await asyncio.sleep(0)
    assert limits.held == 0


async def test_memory_of_large_bodies_is_given_back_after_their_answers() -> None:
    done: list[Any] = []

    async def off_loop(function: Callable[..., Any], *args: Any, size: int = 0) -> Any:
        done.append(function)
        if len(done) == 2:
            raise RuntimeError("cannot schedule new futures after shutdown")

    limits = BodyLimits(ServerSettings(), off_loop)

    async def request(size: int) -> None:
        limits.account()(size)

    for sizes in ([10, SMALL_BODY], [LARGE_BODY + 1] * 3, [LARGE_BODY + 1]):
        await asyncio.gather(*(asyncio.create_task(request(size)) for size in sizes))
        await asyncio.sleep(0.01)
    assert done == [give_memory_back, give_memory_back]


async def test_one_body_always_has_room() -> None:
    async def request() -> None:
        BodyLimits(ServerSettings(max_held_body_bytes=100_000)).account()(1_000_000)

    await asyncio.create_task(request())


@pytest.mark.parametrize("chunked", [False, True])
async def test_bodies_beyond_the_limit_are_503_and_small_ones_pass(live: Callable[..., Any], chunked: bool) -> None:
    """A body counts from its head on, or as it arrives, until its answer is sent."""
    _, port = await live(max_held_body_bytes=500_000, max_body_bytes=400_000)

    def content(size: int, queue: float) -> Any:
        whole = json.dumps({"ids": [1], "queue": queue, "pad2": "a" * size}).encode()

        async def pieces() -> Any:
            for start in range(0, len(whole), 50_000):
                yield whole[start : start + 50_000]

        return pieces() if chunked else whole

    headers = {"content-type": "application/json"}
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30) as http:

        async def post(size: int, queue: float = 0) -> httpx.Response:
            return await http.post("/echo", content=content(size, queue), headers=headers)

        slow = asyncio.create_task(post(300_000, queue=2))
        await asyncio.sleep(0.7)
        refused = await post(300_000)
        assert refused.status_code == 503
        assert refused.headers["retry-after"] == "1"
        assert (await post(10_000)).status_code == 200
        assert (await post(100_000)).status_code == 200
        assert (await slow).status_code == 200
        assert (await post(300_000)).status_code == 200
