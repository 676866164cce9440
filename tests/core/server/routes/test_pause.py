"""The routes of pauses over an engine that only says what it was called with."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from trunkline.core.client.client import Client
from trunkline.core.client.supervisor import Supervisor
from trunkline.core.errors import EngineDown

TWO: list[dict[str, Any]] = [{"model_path": "m"}, {"model_path": "n"}]


def client(port: int) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30)


async def test_all_models_or_the_named_one(live: Callable[..., Any]) -> None:
    engine, port = await live(*TWO)
    async with client(port) as http:
        await http.post("/pause_generation", json={"mode": "retract"})
        await http.post("/continue_generation?model=n", json={"torch_empty_cache": False})
        await http.post("/pause_generation?model=m")
        answer = await http.post("/pause_generation?model=x")
        assert answer.status_code == 400
        assert answer.json() == {"error": {"message": "The model 'x' does not exist; there are: m, n."}}
    assert await engine.call("calls") == [
        ["pause", "m", {"mode": "retract"}],
        ["pause", "n", {"mode": "retract"}],
        ["continue", "n", {}],
        ["pause", "m", {"mode": "abort"}],
    ]


async def test_a_pause_that_aborts_ends_what_the_engine_has_not_seen_yet(live: Callable[..., Any]) -> None:
    engine, port = await live(*TWO)
    async with client(port) as http:
        waiting = {"ids": [1], "queue": 5.0}
        mine, other = (asyncio.create_task(http.post("/echo", json=waiting | {"model": name})) for name in ("m", "n"))
        while len(engine._live) < 2:
            await asyncio.sleep(0.01)
        await http.post("/pause_generation?model=m")
        ended = await mine
        assert ended.json()[0]["finish"]["message"] == "Abort in waiting queue"
        assert not other.done()
        engine.abort(everything=True)
        await other


async def test_an_engine_that_is_started_again_is_told_of_the_pause(
    start: Callable[..., Any],
) -> None:
    engine: Client[Supervisor] = await start(*TWO)
    assert await engine.call("paused") == []
    await engine.call("change", paused=[False, True])
    with pytest.raises(EngineDown):
        await engine.call("die")
    while not engine.transport.up:
        await asyncio.sleep(0.01)
    assert await engine.call("paused") == [False, True]
