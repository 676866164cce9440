"""What /metrics says, with an engine process that is none: core's metrics, and collectors of plugins."""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import msgspec
import pytest
from prometheus_client import Counter, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from trunkline.core.client.contracts import Failures
from trunkline.core.client.metrics import CoreMetrics
from trunkline.core.discovery import Plugin
from trunkline.core.engine.messages import Heartbeat, Load, ModelsChanged
from trunkline.core.errors import EngineDown
from trunkline.core.host import Host
from trunkline.core.types import Reply, RequestObserver


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
        "cached_tokens_total": 3,
        "e2e_request_latency_seconds_count": 2,
    }
    assert {name: found[f"sglang:{name}{label}"] for name in expected} == expected
    assert found["sglang:cache_hit_rate"] == 0.5


async def test_times_are_those_of_the_request(live: Callable[..., Any]) -> None:
    _, port = await live(enable_metrics=True)
    async with at(port) as http:
        await http.post("/echo", json={"ids": [1], "n": 3, "delay": 0.2})
        found = {name.split("{")[0]: value for name, value in numbers((await http.get("/metrics")).text).items()}
    assert 0.59 <= found["sglang:e2e_request_latency_seconds_sum"] < 30


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
    front = (state["num_running_reqs"], state["num_waiting_reqs"])
    assert front == (0, 0), "server info counts the requests that it knows itself"
    assert state["free_tokens"] == 900
    assert state["memory_usage"]["token_capacity"] == 1000


async def test_state_of_the_engine(live: Callable[..., Any]) -> None:
    engine, port = await live(enable_metrics=True)

    async def state() -> tuple[float, float]:
        found = numbers((await http.get("/metrics")).text)
        return found["trunkline:engine_healthy"], found["trunkline:engine_restarts_total"]

    async with at(port) as http:
        assert await state() == (1, 0)
        with pytest.raises(EngineDown):
            await engine.call("die")
        assert (await state())[0] == 0
        while not engine.transport.healthy:
            await asyncio.sleep(0.02)
        assert await state() == (1, 1)


def test_retracted_requests_are_a_part_of_those_that_wait() -> None:
    load = Load("m", waiting=5, running=2, retracted=3, free_slots=900, slots=1000)
    transport: Any = SimpleNamespace(beat=Heartbeat(0.0, [load]), healthy=True, restarts=0, replicas=())
    found = numbers(generate_latest(CoreMetrics(transport, lambda: 0.0, str, Failures())).decode())
    assert found['sglang:num_retracted_reqs{model_name="m"}'] == 3
    assert found['sglang:num_queue_reqs{model_name="m"}'] == 5


async def test_updates_that_rename_a_model_make_no_new_series(live: Callable[..., Any]) -> None:
    engine, port = await live(enable_metrics=True)
    async with at(port) as http:
        await http.post("/echo", json={"ids": [1]})
        (served,) = engine.models
        for step in range(3):
            new = msgspec.structs.replace(served, name=f"step-{step}", aliases=(served.name,))
            engine.transport._change(ModelsChanged([new], list(engine._config.models)))
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


class Noises(Counter, RequestObserver):
    """A collector that counts requests by itself."""

    def ended(self, reply: Reply) -> None:
        self.labels(reply.model_label, reply.task).inc()


class Broken(Collector):
    """Can be read when the server starts, and never again."""

    def __init__(self) -> None:
        self.reads = 0

    def collect(self) -> Iterator[Metric]:
        self.reads += 1
        yield GaugeMetricFamily("broken", "Breaks.", value=1)
        if self.reads > 1:
            sys.exit("no more numbers")


def noises(name: str) -> Noises:
    return Noises(name, "Requests.", ["model_name", "task"], registry=None)


def provide(host: Host, plugin: Callable[..., Plugin], **collectors: Any) -> None:
    """Load a plugin for each of the collectors, as ``NAME-dist 1.0``."""
    found = [plugin(name, trunkline_metrics=lambda one=one: [one]) for name, one in collectors.items()]
    for one in found:
        one.distribution, one.version = f"{one.name}-dist", "1.0"
    host._load(found, required=collectors)


async def test_collectors_of_plugins_are_shown_and_told_of_requests(
    live: Callable[..., Any], host: Host, plugin: Callable[..., Plugin]
) -> None:
    provide(host, plugin, loud=noises("loud"))
    engine, port = await live(enable_metrics=True)
    async with at(port) as http:
        for n in (1, 2):
            await http.post("/echo", json={"ids": [1], "n": n})
        found = numbers((await http.get("/metrics")).text)
    assert found[f'loud_total{{model_name="{engine.models[0].name}",task="echo"}}'] == 2


async def test_a_collector_whose_names_are_taken_is_named_and_left_out(
    live: Callable[..., Any], host: Host, plugin: Callable[..., Plugin], caplog: pytest.LogCaptureFixture
) -> None:
    first, second, core = noises("loud"), noises("loud"), noises("sglang:num_requests")
    provide(host, plugin, a=second, b=core, z=first)  # the last that is loaded is asked first
    _, port = await live(enable_metrics=True)
    async with at(port) as http:
        await http.post("/echo", json={"ids": [1]})
        text = (await http.get("/metrics")).text
    assert (text.count("# TYPE loud_total"), text.count("# TYPE sglang:num_requests_total")) == (1, 1)
    assert [len(one._metrics) for one in (first, second, core)] == [1, 0, 0], "who is left out isn't told of requests"
    refused = [record.getMessage() for record in caplog.records if "are left out" in record.getMessage()]
    assert [message.split(":")[0] for message in refused] == ["plugin 'b' (b-dist 1.0)", "plugin 'a' (a-dist 1.0)"]
    assert "the metrics of Noises are left out" in refused[0]
    assert "sglang:num_requests" in refused[0]


@pytest.mark.field
async def test_a_collector_that_fails_is_left_out_of_the_answer_and_named_once(
    live: Callable[..., Any], host: Host, plugin: Callable[..., Plugin], caplog: pytest.LogCaptureFixture
) -> None:
    provide(host, plugin, bad=Broken(), worse=object(), fine=noises("loud"))
    _, port = await live(enable_metrics=True)
    async with at(port) as http:
        await http.post("/echo", json={"ids": [1]})
        texts = [(await http.get("/metrics")).text for _ in range(3)]
    for text in texts:
        assert "# TYPE broken" not in text
        assert "loud_total{" in text
        assert "sglang:num_requests_total{" in text
    assert numbers(texts[-1])['trunkline:plugin_failures_total{method="Broken.collect",plugin="bad"}'] == 2
    messages = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert [message for message in messages if "Broken.collect raised SystemExit: no more numbers" in message] == [
        "plugin 'bad' (bad-dist 1.0): Broken.collect raised SystemExit: no more numbers; "
        "further failures of it are only counted"
    ]
    assert any("plugin 'worse' (worse-dist 1.0): the metrics of object are left out" in one for one in messages)


async def test_servers_in_one_process_count_apart(
    live: Callable[..., Any], host: Host, plugin: Callable[..., Plugin]
) -> None:
    host._load([plugin("loud", trunkline_metrics=lambda: [noises("loud")])], required=["loud"])
    (_, one), (_, other) = await live(enable_metrics=True), await live(enable_metrics=True)
    async with at(one) as http:
        await http.post("/echo", json={"ids": [1]})
    async with at(other) as http:
        assert "loud_total{" not in (await http.get("/metrics")).text
    async with at(one) as http:
        assert "loud_total{" in (await http.get("/metrics")).text


async def test_without_the_flag_there_is_no_such_route_and_nobody_is_asked(
    live: Callable[..., Any], host: Host, plugin: Callable[..., Plugin]
) -> None:
    asked: list[str] = []
    host._load([plugin("loud", trunkline_metrics=lambda: asked.append("metrics") or [])], required=["loud"])
    _, port = await live()
    async with at(port) as http:
        assert (await http.get("/metrics")).status_code == 404
    assert asked == []


async def test_scrapers_need_no_key_but_its_neighbours_do(live: Callable[..., Any]) -> None:
    _, port = await live(enable_metrics=True, api_key="secret")
    async with at(port) as http:
        assert (await http.get("/metrics")).status_code == 200
        for path in ("/metrics/x", "/metricsx", "/metrics/../server_info", "/server_info"):
            assert (await http.get(path)).status_code in (401, 404), path
