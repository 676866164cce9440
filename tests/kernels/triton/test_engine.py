"""The engine on Triton kernels, in the interpreter: tokens and numbers are those of the plain torch kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from tests.core.engine.device import storms
from tests.core.engine.device.late import LateDevice, move
from tests.core.engine.device.storms import (
    MODELS,
    OPTIONS,
    answer,
    assert_same,
    capture,
    lanes,
    random_plan,
    requests,
    storm,
    submit,
)
from tests.core.engine.device.test_watch import watch
from trunkline.core import Engine

TORCH = OPTIONS | {"attention_backend": "torch_native", "max_running_requests": 6}
TRITON = TORCH | {"attention_backend": "triton"}


@pytest.fixture
def start(zoo: Callable[[str], Path]) -> Iterator[Callable[..., Engine]]:
    engines: list[Engine] = []

    def start_engine(**options: Any) -> Engine:
        engines.append(Engine(*(str(zoo(name)) for name in MODELS), dtype="float32", threads=1, **options))
        return engines[-1]

    yield start_engine
    for engine in engines:
        engine.close()


@pytest.mark.parametrize("graphs", [True, pytest.param(False, marks=pytest.mark.interpreter)])
def test_mixed_tasks_and_several_models(graphs: bool, start: Callable[..., Engine]) -> None:
    """In chunks, with retraction, on a late device."""
    made = requests(40 + graphs, experts_from=0)[: 10 if graphs else None]
    expected = [answer(ticket) for ticket in submit(start(**TORCH), made)]
    engine = start(**TRITON)
    assert {lane.model.backend.name for lane in lanes(engine)} == {"triton"}
    for lane in lanes(engine):
        move(lane, LateDevice())
    if graphs:
        capture(engine)
    assert_same([answer(ticket) for ticket in submit(engine, made)], expected)
    assert (sum(lane.runner.device.replays for lane in lanes(engine)) > 10) == graphs
    assert engine.call("flush_cache")
    for lane in lanes(engine):
        assert lane.scheduler.free_slots() == lane.served.max_total_tokens


@pytest.mark.interpreter
def test_failures_aborts_pauses_and_updates(start: Callable[..., Engine], zoo: Callable[[str], Path]) -> None:
    assert storm(start(**TRITON), [str(zoo(name)) for name in MODELS], random_plan(50), graphs=True) > 4


@pytest.mark.interpreter
def test_nothing_waits_for_the_device(start: Callable[..., Engine]) -> None:
    """No forward pass and no launch of a stage reads values on the host."""
    engine = start(**TRITON)
    found = watch(engine)
    for ticket in submit(engine, requests(60, experts_from=0)[:10]):
        ticket.result(60)
    assert found == []


@pytest.mark.interpreter
@pytest.mark.timeout(3600)
def test_many_storms(
    suite: Any, start: Callable[..., Engine], zoo: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storms, "PATIENCE", 600.0)  # on a busy machine, the interpreter takes a minute for a reply
    engine = start(**TRITON)
    folders = [str(zoo(name)) for name in MODELS]
    for number, seed in enumerate(suite.random.sample(range(10**6), 3)):
        storm(engine, folders, random_plan(seed), graphs=number % 2 == 1)
