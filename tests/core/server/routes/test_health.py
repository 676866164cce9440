"""Health probes, over a real port."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import httpx

from trunkline.core.server.lifecycle import Lifecycle


def client(port: int, **headers: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=30)


async def test_health_is_empty_and_follows_the_lifecycle(live: Callable[..., Any]) -> None:
    lifecycle = Lifecycle(warm=False)
    _, port = await live(lifecycle=lifecycle)
    async with client(port) as http:
        for path in ("/health", "/ready", "/health_generate"):
            assert (await http.get(path)).status_code == 503
        lifecycle.warm = True
        for path in ("/health", "/ready", "/health_generate", "/ping"):
            answer = await http.get(path)
            assert (answer.status_code, answer.content) == (200, b"")
            assert (await http.head(path)).status_code == 200
        lifecycle.draining = True
        assert (await http.get("/health")).status_code == 503
        assert (await http.get("/ping")).status_code == 200
        refused = await http.post("/echo", json={"ids": [1]})
        assert refused.status_code == 503
        assert "retry-after" in refused.headers


async def test_health_generate_counts_running_output_as_life(live: Callable[..., Any]) -> None:
    engine, port = await live()
    engine.call = lambda *_, **__: asyncio.Event().wait()  # a probe that is never answered
    async with client(port) as http:
        running = asyncio.create_task(http.post("/echo", json={"ids": [1], "n": 100, "delay": 0.02}))
        assert (await http.get("/health_generate")).status_code == 200
        running.cancel()
