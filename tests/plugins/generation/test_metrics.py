"""Metrics of output tokens, which count only requests that have some."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import generate_latest

from trunkline.core import Engine
from trunkline.core.client.contracts import CheckedObservers
from trunkline.core.client.replies import EngineReply
from trunkline.core.discovery import Plugin, Provided
from trunkline.core.engine.messages import Progress, Started
from trunkline.plugins.embedding.schemas import EmbeddingParams
from trunkline.plugins.generation import trunkline_metrics
from trunkline.plugins.generation.metrics import TokenMetrics
from trunkline.plugins.generation.schemas import GenerationParams

NAMES = ("generation_tokens_total", "time_to_first_token_seconds_count", "inter_token_latency_seconds_count")


def samples(text: bytes) -> dict[str, float]:
    """Sample, with its labels as Prometheus writes them -> value."""
    lines = (line for line in text.decode().splitlines() if not line.startswith("#"))
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


@pytest.fixture
def metrics() -> TokenMetrics:
    return TokenMetrics()


@pytest.fixture
def run(metrics: TokenMetrics) -> Callable[..., dict[str, float]]:
    """``run(*messages, pause=0.0)`` gives a request these messages, each after a pause; returns the samples."""

    def run(*messages: dict[str, Any], pause: float = 0.0, label: str = "m") -> dict[str, float]:
        observers = CheckedObservers([Provided(Plugin("generation", ""), metrics)])
        reply = EngineReply(1, "renamed", "write", "r", 3, lambda reply: None, model_label=label, observers=observers)
        reply.start(Started(1, 0), "")
        for message in messages:
            time.sleep(pause)
            reply.apply(Progress(1, **({"tokens": []} | message)))
        return samples(generate_latest(metrics))

    return run


def counts(found: dict[str, float]) -> list[float]:
    return [found.get(f'sglang:{name}{{model_name="m",task="write"}}', 0.0) for name in NAMES]


def test_tokens_that_come_together_share_the_time_between_messages(run: Callable[..., dict[str, float]]) -> None:
    stop = {"type": "stop"}
    found = run({"tokens": [1]}, {"tokens": [2, 3, 4, 5]}, {"tokens": [6], "finish": stop}, pause=0.05)
    assert counts(found) == [6, 1, 5]
    label = '{model_name="m",task="write"}'
    assert found[f"sglang:time_to_first_token_seconds_sum{label}"] >= 0.05
    assert found[f"sglang:inter_token_latency_seconds_sum{label}"] >= 0.1
    buckets = 'sglang:inter_token_latency_seconds_bucket{le="%s",model_name="m",task="write"}'
    assert found[buckets % "0.01"] == 0
    assert found[buckets % "5.0"] == 5


def test_results_without_tokens_are_not_counted(run: Callable[..., dict[str, float]]) -> None:
    vector = b"\x90"
    assert not any("{" in name for name in run({"data": vector, "finish": {"type": "stop"}}))
    assert not any("{" in name for name in run({"error": (500, "broken", None)}))
    assert counts(run({"data": vector}, {"tokens": [1], "finish": {"type": "length"}})) == [1, 1, 0]


def test_tokens_of_requests_that_fail_or_are_aborted_count(run: Callable[..., dict[str, float]]) -> None:
    assert counts(run({"tokens": [1, 2]}, {"error": (500, "broken", None)})) == [2, 1, 0]
    assert counts(run({"tokens": [1]}, {"finish": {"type": "abort"}})) == [3, 2, 0]


def test_the_label_is_the_first_name_of_a_model(run: Callable[..., dict[str, float]]) -> None:
    found = run({"tokens": [1], "finish": {"type": "stop"}}, label="first")
    assert 'sglang:generation_tokens_total{model_name="first",task="write"}' in found


def test_each_server_has_its_own_metrics() -> None:
    (one,), (other,) = trunkline_metrics(), trunkline_metrics()
    assert one is not other


def test_a_mixed_load_is_counted_by_task(zoo: Callable[[str], Path]) -> None:
    tasks = ("generation", "embedding")
    with Engine(str(zoo("llama")), dtype="float32", threads=1, task=tasks, enable_metrics=True) as engine:
        params = GenerationParams(max_new_tokens=4, temperature=0, ignore_eos=True)
        written = [engine.submit("generation", [5, 6, 7], params) for _ in range(2)]
        vectors = [engine.submit("embedding", [5, 6, number], EmbeddingParams()) for number in range(3)]
        for ticket in (*written, *vectors):
            ticket.result(60)
        assert engine.client.metrics is not None
        found = samples(engine.client.metrics.text())
    by_task = {
        (name, match[1]): value
        for key, value in found.items()
        if (match := re.search(r'task="(\w+)"}$', key)) and (name := key.split("{")[0].removeprefix("sglang:"))
    }
    assert by_task["num_requests_total", "generation"] == 2
    assert by_task["num_requests_total", "embedding"] == 3
    assert by_task["e2e_request_latency_seconds_count", "embedding"] == 3
    assert by_task["generation_tokens_total", "generation"] == 8
    assert by_task["time_to_first_token_seconds_count", "generation"] == 2
    assert {task for name, task in by_task if name in NAMES} == {"generation"}
