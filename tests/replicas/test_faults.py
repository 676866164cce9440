"""What clients see when an engine process or the actor of a replica is killed, and that the server ends cleanly."""

from __future__ import annotations

import asyncio
import collections
import signal
from collections.abc import Callable
from typing import Any

import httpx
import psutil
import pytest

CLIENTS = 6
BODY = {"sampling_params": {"max_new_tokens": 24, "temperature": 0, "ignore_eos": True}}

pytestmark = pytest.mark.ray


def engines(server: Any) -> list[psutil.Process]:
    """The engine processes of its replicas."""
    return [one for one in processes_of(server) if "trunkline.core.engine.process" in one.cmdline()]


def actors(server: Any) -> list[psutil.Process]:
    """The actors of its replicas."""
    return [one for one in processes_of(server) if "ServeReplica" in " ".join(one.cmdline())]


def processes_of(server: Any) -> list[psutil.Process]:
    return psutil.Process(server.process.pid).children(recursive=True)


async def loaded(server: Any, fault: Callable[[], None], seconds: float) -> collections.Counter[int]:
    """Statuses of requests of six clients, while ``fault`` happens after one second. Answers must be right."""
    statuses: collections.Counter[int] = collections.Counter()
    expected: dict[int, str] = {}
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds

    async def client(number: int) -> None:
        async with httpx.AsyncClient(base_url=server.url, timeout=120) as http:
            while loop.time() < end:
                answer = await http.post("/generate", json=BODY | {"input_ids": [number + 3] * 8})
                statuses[answer.status_code] += 1
                if answer.status_code == 200:
                    assert answer.json()["text"] == expected.setdefault(number, answer.json()["text"])
                else:
                    assert int(answer.headers["retry-after"]) > 0
                    await asyncio.sleep(0.05)

    clients = [asyncio.create_task(client(number)) for number in range(CLIENTS)]
    await asyncio.sleep(1)
    fault()
    await asyncio.gather(*clients)
    return statuses


async def until_two(server: Any) -> None:
    """Until two replicas answer."""
    async with asyncio.timeout(120), httpx.AsyncClient(base_url=server.url) as http:
        while True:
            loads = (await http.get("/v1/loads")).json()["loads"]
            if len(loads) == 2 and all(load["max_total_num_tokens"] for load in loads) and len(engines(server)) == 2:
                return
            await asyncio.sleep(0.2)


async def test_an_engine_and_an_actor_are_killed(launch: Callable[..., Any]) -> None:
    server = launch("--replicas", "2", "--threads", "1")
    await until_two(server)
    for kill in (lambda: engines(server)[0].kill(), lambda: actors(server)[0].kill()):
        statuses = await loaded(server, kill, 6)
        assert set(statuses) <= {200, 503}
        # Of the requests in flight at most those of the lost replica fail; the other one answers at once.
        assert statuses[503] <= CLIENTS
        assert statuses[200] > CLIENTS
        await until_two(server)
    assert server.terminate() == 0


async def test_a_client_that_hangs_up_frees_its_slots(launch: Callable[..., Any]) -> None:
    server = launch("--replicas", "2", "--threads", "1")
    assert httpx.get(f"{server.url}/server_info").json()["dp_size"] == 2
    # 64 samples of 400 tokens: many times longer than the test waits.
    parameters = {"max_new_tokens": 400, "ignore_eos": True, "n": 64}
    body = {"input_ids": [5] * 8, "stream": True, "sampling_params": parameters}

    async def busy(http: httpx.AsyncClient) -> bool:
        loads = (await http.get("/v1/loads")).json()["loads"]
        return any(load["num_used_tokens"] or load["num_running_reqs"] for load in loads)

    async with httpx.AsyncClient(base_url=server.url, timeout=60) as http:
        async with http.stream("POST", "/generate", json=body) as answer, asyncio.timeout(30):
            async for _ in answer.aiter_lines():
                if await busy(http):
                    break
        async with asyncio.timeout(5):
            while await busy(http):
                await asyncio.sleep(0.1)
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(60) == 0
