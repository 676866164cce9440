"""That requests of clients that disconnect end at their replicas, and that the server ends cleanly."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from typing import Any

import httpx
import pytest

pytestmark = pytest.mark.ray


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
