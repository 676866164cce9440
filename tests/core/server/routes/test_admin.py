"""Core's administrative routes, over a real port."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from trunkline.core.server.routes.admin import FLUSHED


def client(port: int, **headers: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=30)


async def test_flush_says_what_sglang_says(live: Callable[..., Any]) -> None:
    _, port = await live()
    async with client(port) as http:
        for method in ("GET", "POST"):
            answer = await http.request(method, "/flush_cache", headers={"content-type": "application/json"})
            assert (answer.status_code, answer.text) == (200, FLUSHED)
        busy = asyncio.create_task(http.post("/echo", json={"ids": [1], "queue": 1.0}))
        await asyncio.sleep(0.3)
        answer = await http.post("/flush_cache")
        assert (answer.status_code, answer.text) == (400, "Flush cache failed.\n")
        answer = await http.post("/flush_cache?timeout=0.1")
        assert (answer.status_code, answer.text) == (400, "Timed out waiting for idle state.")
        both = await asyncio.gather(http.post("/flush_cache?timeout=20"), http.post("/flush_cache?timeout=20"))
        assert sorted(answer.status_code for answer in both) == [200, 400]
        assert "Another flush_cache is already in progress." in {answer.text for answer in both}
        await busy


@pytest.mark.parametrize("timeout", ["-1", "x", "nan", "inf", "1e9", ""])
async def test_flush_refuses_odd_timeouts(live: Callable[..., Any], timeout: str) -> None:
    _, port = await live()
    async with client(port) as http:
        answer = await http.post(f"/flush_cache?timeout={timeout}")
        assert answer.status_code == 400
        assert answer.json()["type"] == "Bad Request"


async def test_abort_answers_the_aborted_with_what_they_have(live: Callable[..., Any]) -> None:
    engine, port = await live()
    async with client(port) as http:
        slow = asyncio.create_task(http.post("/echo", json={"ids": [1], "n": 1000, "delay": 0.01, "rid": "x_1"}))
        while not engine.status.results:
            await asyncio.sleep(0.01)
        for body in ({}, {"rid": ""}, {"rid": None}, {"rid": "unknown"}):
            answer = await http.post("/abort_request", json=body)
            assert (answer.status_code, answer.content) == (200, b"")
        assert not slow.done()
        await http.post("/abort_request", json={"rid": "x"})
        aborted = await slow
        assert aborted.status_code == 200
        assert aborted.json()[0]["finish"]["type"] == "abort"
        assert aborted.json()[0]["ids"]
        assert (await http.post("/abort_request")).status_code == 400


@pytest.mark.field
@pytest.mark.parametrize(
    ("path", "field", "most"),
    [
        ("/update_weight_version", "new_version", 256),
        ("/update_weights_from_disk", "model_path", 4096),
        ("/update_weights_from_disk", "weight_version", 256),
        ("/get_weights_by_name", "name", 1024),
        ("/abort_request", "rid", 1024),
    ],
)
async def test_strings_of_administrators_are_bounded(
    live: Callable[..., Any], path: str, field: str, most: int
) -> None:
    _, port = await live()
    async with client(port) as http:
        body = {"model_path": "m"} | {field: "a" * (most + 1)}
        answer = await http.post(path, json=body)
        assert answer.status_code == 400
        assert f"length <= {most} - at `$.{field}`" in answer.json()["message"]
