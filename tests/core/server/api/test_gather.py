"""Running all items of a request, through the child process that echoes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from trunkline.core.errors import RequestError
from trunkline.core.server.api import while_connected
from trunkline.core.server.api.bodies import ClientGone
from trunkline.core.server.api.gather import item_meta, submit_and_wait
from trunkline.core.server.api.prepare import PreparedInput


def client(*, leaves_after: float = 60.0) -> Any:
    """A request whose client hangs up after so many seconds."""

    async def receive() -> dict[str, str]:
        await asyncio.sleep(leaves_after)
        return {"type": "http.disconnect"}

    return SimpleNamespace(receive=receive)


async def run(engine: Any, params: Any, items: list[PreparedInput], **options: Any) -> Any:
    served = engine.models[0]
    rids = [f"r{index}" for index in range(len(items))]
    return await submit_and_wait(engine, served, "echo", items, params, rids, **options)


async def test_all_run_together_and_keep_their_order(start: Callable[..., Any], params: Any) -> None:
    engine = await start()
    items = [PreparedInput([index, index]) for index in range(5)]
    replies = await run(engine, params(n=1), items)
    assert [reply.tokens for reply in replies] == [[0], [1], [2], [3], [4]]
    assert [reply.rid for reply in replies] == ["r0", "r1", "r2", "r3", "r4"]
    assert await run(engine, params(n=1), []) == []


async def test_a_failure_names_the_item_and_ends_the_others(start: Callable[..., Any], params: Any) -> None:
    engine = await start()
    with pytest.raises(RequestError, match=r"^input\[0\]: refused$"):
        await run(engine, params(refuse=True), [PreparedInput([1])])
    with pytest.raises(RequestError, match=r"^refused$"):
        await run(engine, params(refuse=True), [PreparedInput([1])], single=True)
    assert len(engine._live) == 0


async def test_who_hangs_up_cancels_all(start: Callable[..., Any], params: Any) -> None:
    engine = await start()
    with pytest.raises(ClientGone):
        await while_connected(
            client(leaves_after=0.2), run(engine, params(n=10, delay=0.2), [PreparedInput([1]), PreparedInput([2])])
        )
    assert len(engine._live) == 0
    assert await engine.call("aborted") == 2


async def test_an_aborted_item_has_no_result(start: Callable[..., Any], params: Any) -> None:
    engine = await start()
    running = asyncio.create_task(run(engine, params(n=10, delay=0.2), [PreparedInput([1]), PreparedInput([2])]))
    while len(engine._live) < 2:
        await asyncio.sleep(0.01)
    assert engine.abort("r1") == 1
    with pytest.raises(RequestError, match=r"^input\[1\]: .*[Aa]bort") as caught:
        await running
    assert caught.value.status < 500
    assert len(engine._live) == 0


def test_meta_info_has_what_the_native_api_says_and_tells_of_cuts() -> None:
    reply: Any = SimpleNamespace(
        rid="r", finish={"type": "length"}, created=1.0, finished=3.5, cached_tokens=4, weight_version=""
    )
    served: Any = SimpleNamespace(weight_version="v")
    meta = item_meta(reply, served, PreparedInput([1, 2]))
    assert meta == {
        "id": "r",
        "finish_reason": {"type": "length"},
        "prompt_tokens": 2,
        "weight_version": "v",
        "e2e_latency": 2.5,
    }
    cut = item_meta(reply, served, PreparedInput([1, 2], cut=True, whole=9), cached=True)
    assert cut == meta | {"cached_tokens": 4, "truncated": True, "original_tokens": 9}
