"""What routers and monitors are told, over a real port."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families


def client(port: int) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30)


async def busy(http: httpx.AsyncClient, engine: Any) -> list[asyncio.Task[Any]]:
    """One request that runs and two that wait, of 3 prompt tokens each."""
    before = engine.status.results
    running = asyncio.create_task(http.post("/echo", json={"ids": [1, 2, 3], "n": 500, "delay": 0.01}))
    while engine.status.results == before:
        await asyncio.sleep(0.01)
    waiting = asyncio.create_task(http.post("/echo", json={"ids": [1, 2, 3], "queue": 5, "copies": 2}))
    while len(engine._queue_limits.replies) < 2:
        await asyncio.sleep(0.01)
    return [running, waiting]


async def test_get_load_counts_at_once(live: Callable[..., Any]) -> None:
    engine, port = await live()
    async with client(port) as http:
        [idle] = (await http.get("/get_load")).json()
        assert {key: idle[key] for key in ("rid", "dp_rank", "num_reqs", "num_waiting_reqs")} == {
            "rid": None,
            "dp_rank": 0,
            "num_reqs": 0,
            "num_waiting_reqs": 0,
        }
        tasks = await busy(http, engine)
        [load] = (await http.get("/get_load")).json()
        assert (load["num_reqs"], load["num_waiting_reqs"]) == (3, 2)
        [state] = (await http.get("/server_info")).json()["internal_states"]
        assert (state["num_running_reqs"], state["num_waiting_reqs"]) == (1, 2)
        for task in tasks:
            task.cancel()


async def test_v1_loads_has_sglangs_keys(live: Callable[..., Any]) -> None:
    engine, port = await live()
    async with client(port) as http:
        await http.post("/echo", json={"ids": [1, 2, 3, 4]})
        tasks = await busy(http, engine)
        while not engine.transport.beat.loads:
            await asyncio.sleep(0.01)
        answer = (await http.get("/v1/loads")).json()
        assert answer.keys() == {"timestamp", "version", "accelerator", "num_accelerators", "loads"}
        [load] = answer["loads"]
        assert load.pop("timestamp") > 0
        assert load.pop("gen_throughput") >= 0
        rate = load.pop("cache_hit_rate")
        assert rate == pytest.approx((3 + 2) / (4 + 3), abs=1e-3)
        assert load.pop("memory").keys() == {"weight_gb", "kv_cache_gb", "graph_gb", "token_capacity"}
        assert load == {
            "dp_rank": 0,
            "model": "m",
            "num_running_reqs": 1,
            "num_waiting_reqs": 2,
            "num_waiting_uncached_tokens": round(6 * (1 - rate)),
            "num_used_tokens": 100,
            "num_total_tokens": 106,
            "max_total_num_tokens": 1000,
            "max_running_requests": 4,
            "token_usage": 0.1,
            "utilization": 0.25,
            "queues": {"waiting": 2},
        }
        for task in tasks:
            task.cancel()


async def test_sections_and_ranks_are_chosen(live: Callable[..., Any]) -> None:
    _, port = await live({"model_path": "one"}, {"model_path": "two"})
    async with client(port) as http:

        async def ask(**query: Any) -> Any:
            return await http.get("/v1/loads", params=query)

        both = (await ask()).json()["loads"]
        assert [(load["dp_rank"], load["model"]) for load in both] == [(0, "one"), (1, "two")]
        assert [load["model"] for load in (await ask(model="two")).json()["loads"]] == ["two"]
        assert [load["model"] for load in (await ask(dp_rank=1)).json()["loads"]] == ["two"]
        assert (await ask(dp_rank=7)).json()["loads"] == []
        [core] = (await ask(include="core", dp_rank=0)).json()["loads"]
        assert not core.keys() & {"memory", "queues"}
        assert core["num_running_reqs"] == 0
        [some] = (await ask(include="memory, spec", dp_rank=0)).json()["loads"]
        assert core.keys() == some.keys() - {"memory"}
        assert len((await http.get("/get_load?model=two")).json()) == 1


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ({"include": "core,fun"}, "Invalid include sections: ['fun']. Valid options: ["),
        ({"format": "xml"}, "format must be json or prometheus."),
        ({"dp_rank": "-1"}, "dp_rank must be a number from 0 on, got '-1'."),
        ({"dp_rank": "9" * 5000}, "dp_rank must be a number from 0 on"),
    ],
)
async def test_bad_queries(live: Callable[..., Any], query: dict[str, str], message: str) -> None:
    _, port = await live()
    async with client(port) as http:
        answer = await http.get("/v1/loads", params=query)
        assert answer.status_code == 400
        assert answer.json()["error"]["message"].startswith(message)


async def test_prometheus_can_read_it(live: Callable[..., Any]) -> None:
    _, port = await live({"model_path": "one"}, {"model_path": "two"})
    async with client(port) as http:
        answer = await http.get("/v1/loads?format=prometheus")
        assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
        families = {family.name: family for family in text_string_to_metric_families(answer.text)}
        assert {sample.labels["dp_rank"] for sample in families["sglang_num_running_reqs"].samples} == {"0", "1"}
        assert families["sglang_memory_token_capacity"].samples[0].value == 1000
        assert families["sglang_queues_waiting"].type == "gauge"
        assert "sglang_model" not in families
