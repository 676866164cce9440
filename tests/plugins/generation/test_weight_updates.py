"""Extra outputs of a prompt are of one version of the weights, whenever an update comes."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import msgspec
import pytest

from trunkline.core import Engine
from trunkline.core.engine.lane import Lane
from trunkline.plugins.generation.native.body_schemas import GenerateBody
from trunkline.plugins.generation.native.make_job import make_job
from trunkline.plugins.generation.sampling.extra_rows import ExtraState
from trunkline.plugins.generation.service import Service

NEAR = 1e-4
PROMPT = [5 + (index * 37) % 480 for index in range(60)]
MODES = ["retract", "in_place"]


def start(folder: Path) -> Engine:
    return Engine(str(folder), dtype="float32", threads=1, chunked_prefill_size=16, enable_return_hidden_states=True)


async def generate(service: Service, n: int) -> list[dict[str, Any]]:
    """The ``meta_info`` of n samples, with all that is said of the prompt."""
    body = GenerateBody(
        input_ids=PROMPT,
        sampling_params={"max_new_tokens": 3, "temperature": 0, "ignore_eos": True, "n": n},
        return_logprob=True,
        logprob_start_len=4,
        top_logprobs_num=2,
        return_hidden_states=n == 1,
    )
    sequences = await service.complete(await make_job(service, body))
    return [_decoded(sequence.record()) for sequence in sequences]


def _decoded(record: dict[str, Any]) -> dict[str, Any]:
    decoded: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(record))
    return decoded


def interrupted(engine: Engine, chosen: Callable[[Lane, list[Any]], bool], then: Callable[[Lane], None]) -> None:
    """Call ``then`` in the engine after the first batch that is ``chosen`` by its steps."""
    lane = engine.client.transport.loop.lanes[0]
    assert isinstance(lane, Lane)
    finish, done = lane.finish, []

    def observed(flight: Any, following: Any = None, **options: Any) -> Any:
        steps = finish(flight, following, **options)
        if not done and chosen(lane, steps):
            done.append(True)
            then(lane)
        return steps

    lane.finish = observed  # type: ignore[method-assign]


def assert_same(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert len(found) == len(expected)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine["output_ids"] == theirs["output_ids"]
        a, b = mine["meta_info"], theirs["meta_info"]
        for name in ("input_token_logprobs", "output_token_logprobs"):
            assert [entry[1] for entry in a[name]] == [entry[1] for entry in b[name]]
            assert_near([entry[0] for entry in a[name]], [entry[0] for entry in b[name]])
        if "hidden_states" in b:
            assert_near(a["hidden_states"], b["hidden_states"])


def assert_near(found: Any, expected: Any) -> None:
    if isinstance(expected, list):
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            assert_near(a, b)
    else:
        assert found == (None if expected is None else pytest.approx(expected, abs=NEAR, rel=NEAR))


def wait(condition: Callable[[], bool]) -> None:
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it never happened")


@pytest.fixture
def folders(zoo: Callable[[str], Path], other: Callable[[str], Path]) -> tuple[Path, Path]:
    return zoo("llama"), other("llama")


def answers(folder: Path, n: int) -> list[dict[str, Any]]:
    with start(folder) as engine:
        return engine.run(generate(engine.service(Service), n))


def paused_and_updated(
    old: Path, new: Path, n: int, mode: str, chosen: Callable[[Lane, list[Any]], bool]
) -> list[dict[str, Any]]:
    """The answers where the model pauses after the chosen batch, and its weights are updated in the pause."""
    with start(old) as engine:
        lane = engine.client.transport.loop.lanes[0]
        interrupted(engine, chosen, lambda lane: setattr(lane, "paused", True))
        future: Future[Any] = engine.start(generate(engine.service(Service), n))
        wait(lambda: lane.paused and lane.scheduler.waiting + lane.scheduler.running == n)
        engine.call("pause", mode=mode)
        assert engine.call("update_weights", model_path=str(new))["success"]
        engine.call("continue")
        found: list[dict[str, Any]] = future.result(60)
        return found


def half_computed(lane: Lane, steps: list[Any]) -> bool:
    return bool(steps) and not any(step.finish for step in steps)  # log-probabilities of a first chunk


def prefilled(lane: Lane, steps: list[Any]) -> bool:
    return any(step.finish for step in steps)


@pytest.mark.parametrize("mode", MODES)
def test_a_prompt_that_is_half_computed(folders: tuple[Path, Path], mode: str) -> None:
    old, new = folders
    assert_same(paused_and_updated(old, new, 1, mode, half_computed), answers(new, 1))


@pytest.mark.parametrize("mode", MODES)
def test_samples_that_wait_in_a_pause(folders: tuple[Path, Path], mode: str) -> None:
    """Their prompt was computed before it, by the request that fills the cache for all of them."""
    old, new = folders
    assert_same(paused_and_updated(old, new, 2, mode, prefilled), answers(new, 2))


def updated_meanwhile(old: Path, new: Path) -> list[dict[str, Any]]:
    """The answers of two samples where an update is sent while their prompt is computed."""
    with start(old) as engine:
        calls: list[Future[Any]] = []

        async def update() -> Any:
            return await engine.client.call("update_weights", model_path=str(new))

        def send(lane: Lane) -> None:
            calls.append(engine.start(update()))
            time.sleep(0.5)  # the engine computes the rest of the prompt when the call has been sent

        interrupted(engine, lambda lane, steps: True, send)
        found = engine.run(generate(engine.service(Service), 2))
        assert calls[0].result(60)["success"]
        return found


def test_an_update_while_the_prompt_of_samples_is_computed(folders: tuple[Path, Path]) -> None:
    """The update waits for the prompt, and the samples for the update."""
    old, new = folders
    assert_same(updated_meanwhile(old, new), answers(new, 2))


def test_without_an_update_samples_do_not_compute_the_prompt_again(folders: tuple[Path, Path]) -> None:
    """Also where the last chunk has the last token only, whose log-probability the chunk before gave."""
    with start(folders[0]) as engine:
        computed: list[int] = []

        def count(lane: Lane, steps: list[Any]) -> bool:
            computed.append(lane.scheduler.free_slots())
            return False

        interrupted(engine, count, lambda lane: None)
        prompt = PROMPT[:33]
        body = GenerateBody(
            input_ids=prompt,
            sampling_params={"max_new_tokens": 1, "n": 2},
            return_logprob=True,
            logprob_start_len=0,
        )
        service = engine.service(Service)

        async def run() -> list[dict[str, Any]]:
            return [sequence.record() for sequence in await service.complete(await make_job(service, body))]

        records = engine.run(run())
        assert [record["meta_info"]["cached_tokens"] for record in records] == [32, 32]
        assert len(computed) == 3 + 1  # chunks of 16, 16 and 1, then both samples


def test_seeded_bugs_are_caught(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = folders
    with monkeypatch.context() as patch:
        patch.setattr(ExtraState, "restarted", lambda self: self)
        with pytest.raises(AssertionError):
            assert_same(paused_and_updated(old, new, 1, "retract", half_computed), answers(new, 1))
    with monkeypatch.context() as patch:
        patch.setattr(secrets, "randbits", lambda bits: 1)
        patch.setattr(ExtraState, "restarted", lambda self: self)
        with pytest.raises(AssertionError):
            assert_same(paused_and_updated(old, new, 2, "retract", prefilled), answers(new, 2))
    with monkeypatch.context() as patch:
        patch.setattr(secrets, "randbits", lambda bits: 1)
        with pytest.raises(AssertionError):
            assert_same(updated_meanwhile(old, new), answers(new, 2))
