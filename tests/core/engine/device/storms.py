"""Storms: requests of mixed tasks and several models, with aborts, pauses, updates and failures at any time."""

from __future__ import annotations

import random
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Literal

import numpy as np
from hypothesis import strategies as st
from msgspec import structs

from trunkline.core import Engine
from trunkline.core.engine.device.cpu import CpuDevice
from trunkline.core.engine.lane import Lane
from trunkline.core.errors import RequestError
from trunkline.core.types import Submission
from trunkline.plugins.embedding.schemas import EmbeddingParams
from trunkline.plugins.generation.schemas import GenerationParams, LogprobParams
from trunkline.plugins.rerank.schemas import RerankParams

from .late import LateDevice, move

MODELS = ("llama", "qwen3-moe", "bert-score", "bert")
TASKS = ("generation", "generation", "rerank", "embedding")  # of these models
OPTIONS: dict[str, Any] = {"chunked_prefill_size": 16, "max_total_tokens": 300}
GRAPHS = OPTIONS | {"attention_backend": "torch_native", "max_running_requests": 6}
PASSES = 400  # of which some fail
PATIENCE = 60.0  # seconds for a reply
LEFT = 8  # requests that aren't aborted
COMMON = [random.Random(0).randrange(4, 500) for _ in range(30)]  # prompts begin with a part of it

Answer = tuple[Any, ...]
Asked = tuple[int, Submission]  # index of the model, what is submitted


@dataclass(frozen=True)
class Event:
    """A request is aborted, or a model is paused and goes on, perhaps updated to the same weights. Then ``seconds``."""

    kind: Literal["abort", "retract", "in_place", "nothing"]
    target: int = 0  # request or model, modulo their number
    update: bool = False
    seconds: float = 0.0


@dataclass(frozen=True)
class Plan:
    """What happens in a storm. ``lost``: numbers of the results that don't arrive; ``refused``: of the passes over
    several rows that can't be started.
    """

    asked: Sequence[Asked]
    events: Sequence[Event]
    lost: frozenset[int] = field(default_factory=frozenset)
    refused: frozenset[int] = field(default_factory=frozenset)


def make_request(model: int, prompt: list[int], params: dict[str, Any], *, experts_from: int | None = None) -> Asked:
    """A request of the model's task; ``params`` are for generation."""
    made: Any = {"embedding": EmbeddingParams, "rerank": RerankParams}.get(TASKS[model])
    if made is not None:
        return model, Submission(prompt=prompt, params=made(), rid="")
    experts = {"experts_from": experts_from} if MODELS[model] == "qwen3-moe" else {}
    return model, Submission(prompt=prompt, params=GenerationParams(**params, **experts), rid="")


def requests(seed: int, *, experts_from: int | None = None) -> list[Asked]:
    """24 random requests."""
    dice = random.Random(seed)
    made = []
    for _ in range(24):
        prompt = COMMON[: dice.randrange(31)] + [dice.randrange(4, 500) for _ in range(dice.randint(1, 40))]
        params = {
            "max_new_tokens": dice.choice([0, 1, 2, 30, 60]),
            "temperature": dice.choice([0.0, 0.9]),
            "seed": dice.randrange(9),
            "stop_token_ids": tuple(dice.sample(range(500), dice.choice([0, 0, 60]))),
            "frequency_penalty": dice.choice([0.0, 0.0, 0.0, 0.7]),  # lockstep
            "logprobs": dice.choice([None, LogprobParams(start=2, top=2)]),
        }
        made.append(make_request(dice.choice([0, 0, 0, 1, 2, 3]), prompt, params, experts_from=experts_from))
    return made


def random_plan(seed: int) -> Plan:
    dice = random.Random(seed)
    events = [
        Event(
            kind=dice.choice(["abort", dice.choice(["retract", "in_place"]), "nothing", "nothing"]),
            target=dice.randrange(24),
            update=dice.random() < 0.4,
            seconds=0.01 * dice.random(),
        )
        for _ in range(100)
    ]
    lost, refused = ({number for number in range(PASSES) if dice.random() < part} for part in (0.08, 0.1))
    return Plan(requests(seed), events, frozenset(lost), frozenset(refused))


def asked() -> st.SearchStrategy[Asked]:
    ids = st.integers(4, 499)
    prompts = st.builds(
        lambda end, rest: COMMON[:end] + rest, st.integers(0, 30), st.lists(ids, min_size=1, max_size=40)
    )
    params = st.fixed_dictionaries(
        {
            "max_new_tokens": st.integers(0, 30),
            "temperature": st.sampled_from([0.0, 0.9]),
            "seed": st.integers(0, 9),
            "stop_token_ids": st.lists(ids, max_size=40).map(tuple),
            "frequency_penalty": st.sampled_from([0.0, 0.7]),
            "logprobs": st.sampled_from([None, LogprobParams(start=0, top=1), LogprobParams(start=2, top=2)]),
        }
    )
    return st.builds(make_request, st.integers(0, 3), prompts, params)


def plans() -> st.SearchStrategy[Plan]:
    """Any storm."""
    events = st.builds(
        Event,
        st.sampled_from(["abort", "retract", "in_place", "nothing"]),
        st.integers(0, 23),
        st.booleans(),
        st.sampled_from([0.0, 0.001, 0.01]),
    )
    numbers = st.frozensets(st.integers(0, PASSES - 1), max_size=40)
    return st.builds(Plan, st.lists(asked(), min_size=1, max_size=24), st.lists(events, max_size=40), numbers, numbers)


def lanes(engine: Engine) -> list[Lane]:
    return list(engine.client.transport.loop.lanes)


def submit(engine: Engine, made: Sequence[Asked]) -> list[Any]:
    names = [model.name for model in engine.client.models]
    return [
        engine.submit_all(TASKS[model], [structs.replace(item, rid=str(number))], model=names[model])[0]
        for number, (model, item) in enumerate(made)
    ]


def answer(ticket: Any) -> Answer:
    """Tokens, finish reason and all numbers of a reply, however it came in pieces."""
    reply = ticket.result(PATIENCE)
    arrays: dict[str, list[bytes]] = defaultdict(list)
    for result in reply.results:
        if isinstance(result, dict) and result.pop("restart", False):  # after an update of the weights
            arrays.clear()
        for kind in ("prompt", "output"):
            table = result.pop(kind, None) if isinstance(result, dict) else None
            for name, column in zip(("chosen", "ids", "top"), table or (), strict=False):
                arrays[f"{kind}.{name}"].append(column)
        for name, value in result.items():
            if isinstance(value, bytes):
                arrays[name].append(value)
    numbers = {
        name: np.frombuffer(b"".join(pieces), np.int32 if name.endswith(("ids", "experts")) else np.float32)
        for name, pieces in arrays.items()
    }
    return reply.tokens, reply.finish, numbers


def assert_same(found: list[Answer], expected: list[Answer]) -> None:
    for (tokens, finish, numbers), (other_tokens, other_finish, other_numbers) in zip(found, expected, strict=True):
        assert (tokens, finish) == (other_tokens, other_finish)
        assert numbers.keys() == other_numbers.keys()
        for name, array in numbers.items():
            np.testing.assert_allclose(array, other_numbers[name], atol=2e-4, rtol=2e-4, err_msg=name)


def capture(engine: Engine) -> None:
    """Capture graphs for the lanes that decode."""
    for lane in lanes(engine):
        lane.runner.capture(lane.served.name)
    assert any(lane.runner._graphs for lane in lanes(engine))


def wait(ticket: Any) -> None:
    """Until the reply is complete or has failed. TimeoutError after :data:`PATIENCE` seconds."""
    with suppress(RequestError):
        ticket.result(PATIENCE)


def disturb(engine: Engine, folders: list[str], event: Event) -> None:
    """A pause, and perhaps an update to the same weights in it."""
    index = event.target % len(folders)
    name = lanes(engine)[index].served.name
    engine.call("pause", model=name, mode=event.kind)
    if event.update:
        assert engine.call("update_weights", model=name, model_path=folders[index])["success"]
    engine.call("continue", model=name)


def refuse(lane: Lane, refused: Callable[[], bool]) -> None:
    """Some passes over several rows can't be started."""
    start = lane.runner.start

    def start_or_fail(rows: Any, sources: Any = None) -> Any:
        if len(rows) > 1 and refused():
            raise RuntimeError("the pass can't be started")
        return start(rows, sources)

    lane.runner.start = start_or_fail  # type: ignore[method-assign]


def storm(
    engine: Engine, folders: list[str], plan: Plan, begin: Callable[[], None] = lambda: None, *, graphs: bool = False
) -> int:
    """Answers in a storm equal those without. Returns how many there were.

    ``begin`` is called before the storm. ``graphs``: decode passes are graphs.
    """
    for lane in lanes(engine):
        move(lane, CpuDevice())
    alone = [answer(ticket) for ticket in submit(engine, plan.asked)]
    begin()
    results, passes = count(), count()
    for lane in lanes(engine):
        device = LateDevice()
        device.fails = lambda: next(results) in plan.lost
        move(lane, device)
        refuse(lane, lambda: next(passes) in plan.refused)
    if graphs:
        capture(engine)
    tickets = submit(engine, plan.asked)
    left = list(range(len(tickets)))
    for event in plan.events:
        if all(tickets[index].done for index in left):
            break
        if event.kind == "abort" and len(left) > LEFT:
            tickets[left.pop(event.target % len(left))].cancel()
        elif event.kind in ("retract", "in_place"):
            disturb(engine, folders, event)
        time.sleep(event.seconds)
    compared = 0
    for index in left:
        wait(tickets[index])
        if tickets[index].reply.error is None:  # else it failed twice, which no engine can help
            assert_same([answer(tickets[index])], [alone[index]])
            compared += 1
    engine.call("flush_cache")
    for lane in lanes(engine):
        assert lane.scheduler.free_slots() == lane.served.max_total_tokens, "slots were lost"
        assert not lane._ending
        assert lane.runner.device.disorder == 0, "a result was used after those that depend on it"
    return compared
