"""Weight updates in two phases: loaded and held, then committed or cancelled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from trunkline.core import Engine
from trunkline.core.client.engine import Ticket
from trunkline.core.engine.contracts import CheckedStage
from trunkline.core.engine.control import updates
from trunkline.core.errors import RequestError
from trunkline.plugins.generation.schemas import GenerationParams

PROMPT = list(range(5, 60))


@pytest.fixture
def engine(zoo: Callable[[str], Path]) -> Iterator[Engine]:
    with Engine(str(zoo("llama")), dtype="float32", threads=1) as engine:
        yield engine


@pytest.fixture
def new(other: Callable[[str], Path]) -> str:
    return str(other("llama"))


def submit(engine: Engine) -> Ticket:
    params = GenerationParams(max_new_tokens=12, temperature=0, ignore_eos=True)
    return engine.submit("generation", PROMPT, params)


def test_a_held_update_changes_nothing_until_it_is_committed(engine: Engine, new: str) -> None:
    before = submit(engine).result(60).tokens
    running = submit(engine)
    assert engine.call("update_weights", model_path=new, weight_version="2", hold="a")["success"]
    waiting = submit(engine)
    assert running.result(60).tokens == before
    assert engine.models[0].weight_version == "default"
    assert not waiting.done
    assert engine.call("commit_update", hold="a")["message"].startswith("Succeeded to update model weights.")
    assert engine.models[0].weight_version == "2"
    assert waiting.result(60).tokens != before
    assert waiting.reply.weight_version == "2"
    with pytest.raises(RequestError, match="doesn't wait to be committed") as caught:
        engine.call("commit_update", hold="a")
    assert caught.value.status == 409


def test_a_cancelled_update_leaves_the_weights_and_runs_what_waited(
    engine: Engine, new: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[Any] = []
    close = CheckedStage.close
    monkeypatch.setattr(CheckedStage, "close", lambda stage: closed.append(stage) or close(stage))  # type: ignore[func-returns-value]
    before = submit(engine).result(60).tokens
    lane = engine.client.transport.loop.lanes[0]
    model = lane.model
    assert engine.call("update_weights", model_path=new, hold="a")["success"]
    waiting = submit(engine)
    with pytest.raises(RequestError, match="Another update") as caught:
        engine.call("update_weights", model_path=new, hold="a")
    assert caught.value.status == 409
    with pytest.raises(RequestError, match="doesn't wait"):
        engine.call("cancel_update", hold="b")
    assert engine.call("cancel_update", hold="a") is True
    assert waiting.result(60).tokens == before
    assert lane.model is model
    assert len(closed) == len(lane.stages)
    assert not set(map(id, closed)) & set(map(id, lane.stages.values()))
    with pytest.raises(RequestError, match="doesn't wait to be committed"):
        engine.call("cancel_update", hold="a")
    assert engine.call("update_weights", model_path=new)["success"]


def test_a_held_update_aborts_requests_only_when_it_is_committed(engine: Engine, new: str) -> None:
    params = GenerationParams(max_new_tokens=300, temperature=0, ignore_eos=True)
    running = engine.submit("generation", PROMPT, params)
    assert engine.call("update_weights", model_path=new, hold="a", abort_all_requests=True)["success"]
    assert not running.done
    engine.call("commit_update", hold="a")
    assert running.result(60).finish["type"] == "abort"  # type: ignore[index]


def test_an_update_that_nobody_commits_is_dropped(engine: Engine, new: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(updates, "HOLD_SECONDS", 0.2)
    before = submit(engine).result(60).tokens
    assert engine.call("update_weights", model_path=new, hold="a")["success"]
    assert submit(engine).result(60).tokens == before  # it has waited for that
    assert not engine.client.transport.loop.updates.held


def test_weights_have_numbers(engine: Engine, new: str) -> None:
    assert engine.call("update_weights", model_path=new)["success"]
    assert engine.models[0].update_number == 1
    assert engine.call("update_weights", model_path=new, update_number=5, weight_version="5")["success"]
    assert (engine.models[0].update_number, engine.models[0].weight_version) == (5, "5")
    for lower in (1, 5):
        answer = engine.call("update_weights", model_path=new, update_number=lower, weight_version="lower")
        assert "these weights, or later ones" in answer["message"]
    assert engine.models[0].weight_version == "5"
    with pytest.raises(RequestError, match="was made meanwhile"):
        engine.call("update_weights", model_path=new, update_number=5, hold="a")
