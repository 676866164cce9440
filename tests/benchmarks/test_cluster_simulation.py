"""The simulation of several replicas: routing by prefix reaches its bars, in simulated time."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture
def script(load_script: Callable[[str], ModuleType]) -> Any:
    return load_script("benchmarks/cluster_simulation.py")


def test_cached_share_and_waits(script: Any) -> None:
    """Fast replicas and short answers, so that some seconds have hundreds of requests; small pools."""
    mix = script.Mix(answer=8, think=1.0, documents=60, batch=4)
    setting = script.Setting(script.Size(slots=30_000), script.Cost(0.012, 0.00015, 0.0001), seconds=10.0)
    sessions = script.Generator(5.0).sessions(mix, 4, 10.0)
    ideal = setting.simulate(script.RoundRobin, sessions, 1, scale=4)
    least, ours = (setting.simulate(policy, sessions, 4) for policy in (script.LeastLoaded, script.Prefix))
    assert len(ours.waits) > 250
    assert least.cached < 0.8 * ideal.cached, "it must matter where requests go"
    assert ours.cached >= 0.9 * ideal.cached
    assert ours.wait(99) <= 1.5 * least.wait(99)
    assert ours.first(99) <= 1.5 * least.first(99)


def test_the_same_arguments_give_the_same_outcome(script: Any) -> None:
    setting, generator = script.Setting(script.Size(), script.Cost(), seconds=6.0), script.Generator(1.0)
    traffic = (generator.sessions(script.MIXES["mixed"], 2, 6.0) for _ in range(2))
    once, twice = (setting.simulate(script.Prefix, sessions, 2) for sessions in traffic)
    assert (once.cached, *once.firsts) == (twice.cached, *twice.firsts)


def test_tables(script: Any) -> None:
    setting, generator = script.Setting(script.Size(), script.Cost(), seconds=4.0), script.Generator(0.5)
    rows = list(script.policies(setting, generator.sessions(script.MIXES["one hot prefix"], 2, 4.0), 2))[2:]
    assert len(rows) == 1 + len(script.POLICIES)
    row, last = list(script.curve(setting, generator, [2], script.Front(request=100.0)))[2:]
    assert row.endswith("| front |")
    assert "about 0 replicas" in last
