"""What /metrics says, with an engine process that is none."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from typing import Any

import httpx
import msgspec

from trunkline.core.engine.messages import Changed


def numbers(text: str) -> dict[str, float]:
    """Sample -> value, samples as Prometheus writes them."""
    lines = (line for line in text.splitlines() if line and not line.startswith("#"))
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def at(port: int, **headers: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=30)


async def test_counts_what_requests_took(live: Callable[..., Any]) -> None:
    _, port = await live(enable_metrics=True)
    async with at(port) as http:
        for ids, n in (([1, 2, 3], 4), ([4, 5], 2)):
            assert (await http.post("/echo", json={"ids": ids, "n": n})).status_code < 300
        assert (await http.post("/echo", json={"ids": [9], "refuse": True})).status_code == 400
        answer = await http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    found = numbers(answer.text)
    (label,) = {name[name.index("{") :] for name in found if name.startswith("sglang:num_requests_total")}
    assert re.fullmatch(r'\{model_name="[^"]+",task="echo"\}', label)
    expected = {
        "num_requests_total": 3,
        "num_failed_requests_total": 1,
        "prompt_tokens_total": 6,
        "generation_tokens_total": 6,
        "cached_tokens_total": 3,
        "time_to_first_token_seconds_count": 2,
        "inter_token_latency_seconds_count": 4,
        "e2e_request_latency_seconds_count": 2,
    }
    assert {name: found[f"sglang:{name}{label}"] for name in expected} == expected
    assert found["sglang:cache_hit_rate"] == 0.5


async def test_times_are_those_of_the_request(live: Callable[..., Any]) -> None:
    _, port = await live(enable_metrics=True)
    async with at(port) as http:
        await http.post("/echo", json={"ids": [1], "n": 3, "delay": 0.2})
        found = {name.split("{")[0]: value for name, value in numbers((await http.get("/metrics")).text).items()}
    first, between = (found[f"sglang:{name}_seconds_sum"] for name in ("time_to_first_token", "inter_token_latency"))
    whole = found["sglang:e2e_request_latency_seconds_sum"]
    assert first >= 0.2
    assert between >= 0.39
    assert abs(first + between - whole) < 0.05


async def test_gauges_are_the_heartbeat(live: Callable[..., Any]) -> None:
    engine, port = await live(enable_metrics=True)
    async with at(port) as http:
        while not engine.status.loads():
            await asyncio.sleep(0.02)
        found = numbers((await http.get("/metrics")).text)
        state = (await http.get("/server_info")).json()["internal_states"][0]
    (name,) = {load.model for load in engine.status.loads()}
    by_model = {key: found[f'sglang:{key}{{model_name="{name}"}}'] for key in ("num_running_reqs", "num_queue_reqs")}
    assert by_model == {"num_running_reqs": 2, "num_queue_reqs": 1}
    assert found[f'sglang:num_used_tokens{{model_name="{name}"}}'] == 100
    assert found[f'sglang:token_usage{{model_name="{name}"}}'] == 0.1
    assert (state["num_running_reqs"], state["num_waiting_reqs"], state["free_tokens"]) == (2, 1, 900)
    assert state["memory_usage"]["token_capacity"] == 1000


async def test_updates_that_rename_a_model_make_no_new_series(live: Callable[..., Any]) -> None:
    engine, port = await live(enable_metrics=True)
    async with at(port) as http:
        await http.post("/echo", json={"ids": [1]})
        (served,) = engine.models
        for step in range(3):
            new = msgspec.structs.replace(served, name=f"step-{step}", aliases=(served.name,))
            engine.transport._change(Changed([new], list(engine._config.models)))
            await http.post("/echo", json={"ids": [1]})
        found = numbers((await http.get("/metrics")).text)
    totals = {name: value for name, value in found.items() if name.startswith("sglang:num_requests_total")}
    assert totals == {f'sglang:num_requests_total{{model_name="{served.name}",task="echo"}}': 4}


async def test_a_client_that_leaves_is_an_abort(live: Callable[..., Any]) -> None:
    engine, port = await live(enable_metrics=True)
    async with at(port) as http:
        busy = asyncio.create_task(http.post("/echo", json={"ids": [1], "n": 50, "delay": 0.1}))
        while not len(engine._live):
            await asyncio.sleep(0.02)
        busy.cancel()
        while len(engine._live):
            await asyncio.sleep(0.02)
        found = {name.split("{")[0]: value for name, value in numbers((await http.get("/metrics")).text).items()}
    assert found["sglang:num_aborted_requests_total"] == 1
    assert "sglang:num_failed_requests_total" not in found


async def test_without_the_flag_there_is_no_such_route(live: Callable[..., Any]) -> None:
    _, port = await live()
    async with at(port) as http:
        assert (await http.get("/metrics")).status_code == 404


async def test_scrapers_need_no_key_but_its_neighbours_do(live: Callable[..., Any]) -> None:
    _, port = await live(enable_metrics=True, api_key="secret")
    async with at(port) as http:
        assert (await http.get("/metrics")).status_code == 200
        for path in ("/metrics/x", "/metricsx", "/metrics/../server_info", "/server_info"):
            assert (await http.get(path)).status_code in (401, 404), path
