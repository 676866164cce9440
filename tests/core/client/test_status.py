"""Output tokens a second, as they come and when they don't."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from trunkline.core.client import status as module
from trunkline.core.client.status import Status
from trunkline.core.engine.messages import Load


class Clock:
    now = 1000.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def feed(status: Status, clock: Clock, results: int, *, each: int, apart: float) -> None:
    for _ in range(results):
        clock.now += apart
        status.count(each)


def test_retracted_requests_wait() -> None:
    """The engine says so once a second; those that have ended since are no longer counted."""
    replies = {key: SimpleNamespace(model="m", prompt_tokens=10 * key) for key in range(1, 6)}
    load = Load("m", waiting=4, running=1, retracted=3, free_slots=80, slots=100)
    transport: Any = SimpleNamespace(beat=SimpleNamespace(loads=[load]), ready=None, restarts=0)
    model: Any = SimpleNamespace(name="m", aliases=())
    live: Any = replies
    state = Status(transport, live, {5: live[5]}).model_state(model)
    assert (state["num_running_reqs"], state["num_waiting_reqs"], state["num_waiting_tokens"]) == (1, 4, 50)
    del live[1], live[2]
    state = Status(transport, live, {5: live[5]}).model_state(model)
    assert (state["num_running_reqs"], state["num_waiting_reqs"]) == (0, 3)


def test_a_short_run_is_measured_and_a_pause_is_not(clock: Clock) -> None:
    status = Status(SimpleNamespace())  # type: ignore[arg-type]
    assert (status.throughput, status.last_throughput) == (0.0, 0.0)
    feed(status, clock, 50, each=1, apart=0.01)
    assert status.throughput == pytest.approx(100)
    clock.now += 3600
    assert status.throughput == 0
    assert status.last_throughput == pytest.approx(100)
    status.count(1)
    assert status.throughput == pytest.approx(100), "the first token of a run says nothing yet"
    feed(status, clock, 30, each=4, apart=0.02)
    assert status.throughput == pytest.approx(200)


def test_a_long_run_tells_its_last_second(clock: Clock) -> None:
    status = Status(SimpleNamespace())  # type: ignore[arg-type]
    feed(status, clock, 500, each=1, apart=0.01)
    feed(status, clock, 150, each=1, apart=0.02)
    assert status.throughput == pytest.approx(50, rel=0.05)
    assert status.results == 650


def test_results_without_tokens_are_signs_of_life_only(clock: Clock) -> None:
    status = Status(SimpleNamespace())  # type: ignore[arg-type]
    feed(status, clock, 20, each=0, apart=0.05)
    assert (status.results, status.throughput) == (20, 0.0)
