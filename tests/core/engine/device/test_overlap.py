"""With a batch in flight while the next one is planned, results equal those of the synchronous engine."""

from __future__ import annotations

import random
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from msgspec import structs
from safetensors.torch import load_file, save_file

from trunkline.core import Engine
from trunkline.core.engine.device.cpu import CpuDevice
from trunkline.core.engine.flight import BatchInFlight
from trunkline.core.engine.lane import Lane
from trunkline.core.engine.scheduling.scheduler import Scheduler
from trunkline.core.errors import EngineDown
from trunkline.core.types import Launched, Part, Request, Submission
from trunkline.plugins.embedding.schemas import EmbeddingParams
from trunkline.plugins.generation.schemas import GenerationParams, LogprobParams
from trunkline.plugins.generation.stage import GenerationStage
from trunkline.plugins.rerank.schemas import RerankParams

from .late import LateDevice, move

MODELS = ("llama", "qwen3-moe", "bert-score", "bert")
Answer = tuple[Any, ...]


@pytest.fixture
def start(zoo: Callable[[str], Path]) -> Iterator[Callable[..., Engine]]:
    engines: list[Engine] = []

    def start_engine(*, late: bool, **options: Any) -> Engine:
        engine = Engine(*(str(zoo(name)) for name in MODELS), dtype="float32", threads=1, **options)
        engines.append(engine)
        for lane in lanes(engine):
            if late:
                move(lane, LateDevice())
        return engine

    yield start_engine
    for engine in engines:
        engine.close()


def lanes(engine: Engine) -> list[Lane]:
    return list(engine.client.transport.loop.lanes)


def requests(seed: int, *, experts_from: int | None = None) -> list[tuple[str, str, Submission]]:
    """Requests of several tasks and models, as (model's index, task, what is submitted)."""
    dice = random.Random(seed)
    made: list[tuple[str, str, Submission]] = []
    common = [dice.randrange(4, 500) for _ in range(30)]
    for number in range(24):
        prompt = common[: dice.randrange(31)] + [dice.randrange(4, 500) for _ in range(dice.randint(1, 40))]
        kind = dice.choice(["text", "text", "text", "moe", "vector", "score"])
        if kind in ("text", "moe"):
            params: Any = GenerationParams(
                max_new_tokens=dice.choice([0, 1, 2, 9, 30]),
                temperature=dice.choice([0.0, 0.9]),
                seed=dice.randrange(9),
                stop_token_ids=tuple(dice.sample(range(500), dice.choice([0, 0, 60]))),
                frequency_penalty=dice.choice([0.0, 0.0, 0.7]),  # lockstep
                min_new_tokens=0,
                logprobs=dice.choice([None, LogprobParams(start=2, top=2)]),
                experts_from=experts_from if kind == "moe" else None,
            )
        else:
            params = EmbeddingParams() if kind == "vector" else RerankParams()
        task = {"text": "generation", "moe": "generation", "vector": "embedding", "score": "rerank"}[kind]
        model = ("text", "moe", "score", "vector").index(kind)
        made.append((model, task, Submission(prompt=prompt, params=params, rid=f"{seed}-{number}")))
    return made


def submit(engine: Engine, made: list[tuple[Any, str, Submission]]) -> list[Any]:
    names = [model.name for model in engine.client.models]
    return [engine.submit_all(task, [item], model=names[model])[0] for model, task, item in made]


def answer(ticket: Any) -> Answer:
    """Tokens, finish reason and all numbers of a reply, however it came in pieces."""
    reply = ticket.result(60)
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


OPTIONS: dict[str, Any] = {"chunked_prefill_size": 16, "max_total_tokens": 300}
GRAPHS = OPTIONS | {"attention_backend": "torch_native", "max_running_requests": 6}


@pytest.mark.parametrize("seed", range(4))
def test_mixed_tasks_and_several_models(seed: int, start: Callable[..., Engine]) -> None:
    made = requests(seed)
    alone = [answer(ticket) for ticket in submit(start(late=False, **OPTIONS), made)]
    engine = start(late=True, **OPTIONS)
    assert_same([answer(ticket) for ticket in submit(engine, made)], alone)
    assert max(lane.runner.device.in_flight for lane in lanes(engine)) > 0, "nothing overlapped"
    assert engine.call("flush_cache")  # after the batch in flight, which has rows of requests that have ended
    for lane in lanes(engine):
        assert lane.scheduler.free_slots() == lane.served.max_total_tokens


@pytest.mark.usefixtures("capturing")
@pytest.mark.parametrize("seed", range(30, 33))
def test_decode_passes_that_are_graphs(seed: int, start: Callable[..., Engine]) -> None:
    made = requests(seed, experts_from=0)
    alone = [answer(ticket) for ticket in submit(start(late=False, **GRAPHS), made)]
    engine = start(late=True, **GRAPHS)
    capture(engine)
    assert_same([answer(ticket) for ticket in submit(engine, made)], alone)
    assert sum(lane.runner.device.replays for lane in lanes(engine)) > 10


def capture(engine: Engine) -> None:
    """Capture graphs for the lanes that decode."""
    for lane in lanes(engine):
        lane.runner.capture(lane.served.name)
    assert any(lane.runner._graphs for lane in lanes(engine))


def disturb(engine: Engine, folders: list[str], dice: random.Random) -> None:
    """Pauses in any mode, some with an update to the same weights."""
    lane = dice.choice(lanes(engine))
    name = lane.served.name
    engine.call("pause", model=name, mode=dice.choice(["retract", "in_place"]))
    if dice.random() < 0.4:
        folder = folders[lanes(engine).index(lane)]
        assert engine.call("update_weights", model=name, model_path=folder)["success"]
    engine.call("continue", model=name)


def fail_at_start(lane: Lane, dice: random.Random) -> None:
    """Some passes over several rows can't be started."""
    start = lane.runner.start

    def start_or_fail(rows: Any, sources: Any = None) -> Any:
        if len(rows) > 1 and dice.random() < 0.1:
            raise RuntimeError("the pass can't be started")
        return start(rows, sources)

    lane.runner.start = start_or_fail  # type: ignore[method-assign]


def storm(
    engine: Engine, folders: list[str], seed: int, begin: Callable[[], None] = lambda: None, *, graphs: bool = False
) -> int:
    """Answers in a storm of failures, aborts, pauses and updates equal those without. Returns how many there were.

    ``begin`` is called before the storm. ``graphs``: decode passes are graphs.
    """
    made = requests(seed)
    for lane in lanes(engine):
        move(lane, CpuDevice())
    alone = [answer(ticket) for ticket in submit(engine, made)]
    begin()
    dice = random.Random(seed)
    for lane in lanes(engine):
        device = LateDevice()
        device.fails = lambda: dice.random() < 0.08
        move(lane, device)
        fail_at_start(lane, dice)
    if graphs:
        capture(engine)
    tickets = submit(engine, made)
    left = list(range(len(tickets)))
    while any(not tickets[index].done for index in left):
        event = dice.choice(["abort", "disturb", "nothing", "nothing"])
        if event == "abort" and len(left) > 8:
            tickets[left.pop(dice.randrange(len(left)))].cancel()
        elif event == "disturb":
            disturb(engine, folders, dice)
        time.sleep(0.01 * dice.random())
    compared = 0
    for index in left:
        if tickets[index].reply.error is not None:  # it failed twice, which no engine can help
            continue
        assert_same([answer(tickets[index])], [alone[index]])
        compared += 1
    engine.call("flush_cache")
    for lane in lanes(engine):
        assert lane.scheduler.free_slots() == lane.served.max_total_tokens, "slots were lost"
        assert not lane._ending
        assert lane.runner.device.disorder == 0, "a result was used after those that depend on it"
    return compared


@pytest.mark.usefixtures("capturing")
@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("seed", range(10, 13))
def test_whatever_happens_answers_are_those_of_the_synchronous_engine(
    seed: int, graphs: bool, start: Callable[..., Engine], zoo: Callable[[str], Path]
) -> None:
    engine = start(late=False, **(GRAPHS if graphs else OPTIONS))
    assert storm(engine, [str(zoo(name)) for name in MODELS], seed, graphs=graphs) > 4
    assert max(lane.runner.device.in_flight for lane in lanes(engine)) > 0
    assert (sum(lane.runner.device.replays for lane in lanes(engine)) > 0) == graphs


@pytest.mark.properties
@pytest.mark.timeout(3600)
@pytest.mark.usefixtures("capturing")
@pytest.mark.parametrize("number", range(10))
def test_many_storms(number: int, suite: Any, start: Callable[..., Engine], zoo: Callable[[str], Path]) -> None:
    engine = start(late=False, **(GRAPHS if number % 2 else OPTIONS))
    for seed in suite.random.sample(range(10**6), 30):
        storm(engine, [str(zoo(name)) for name in MODELS], seed + number, graphs=number % 2 == 1)


def keep_uploads(patch: pytest.MonkeyPatch) -> None:
    """Sampling parameters stay on the device while the rows are the same."""
    launch, kept = GenerationStage.launch, {}

    def launch_with_old(self: GenerationStage, part: Part, hidden: torch.Tensor) -> Launched:
        if "seed" in part.tensors:
            keys = tuple(row.request.key for row in part.rows)
            part.tensors["seed"] = kept.setdefault(keys, part.tensors["seed"])
        return launch(self, part, hidden)

    patch.setattr(GenerationStage, "launch", launch_with_old)


def free_in_flight(patch: pytest.MonkeyPatch) -> None:
    """The slots of a request that ends are free at once."""
    finish = Scheduler.finish

    def finish_now(self: Scheduler, request: Request) -> bool:
        entry = request.schedule
        if not finish(self, request) and entry is not None:
            entry.ended, self._ending = False, self._ending - 1
            self._ledger.close(entry)
        return True

    patch.setattr(Scheduler, "finish", finish_now)


def read_the_wrong_row(patch: pytest.MonkeyPatch) -> None:
    """Inputs are those of the row's neighbour in the batch before."""
    next_ids = BatchInFlight._next_ids

    def shifted(self: BatchInFlight) -> tuple[torch.Tensor | None, dict[int, int]]:
        ids, indices = next_ids(self)
        return (None if ids is None else ids.roll(1)), indices

    patch.setattr(BatchInFlight, "_next_ids", shifted)


def overlap_lockstep(patch: pytest.MonkeyPatch) -> None:
    """Penalties are computed without the token that is awaited."""
    admit = GenerationStage.admit
    patch.setattr(GenerationStage, "admit", lambda self, request: structs.replace(admit(self, request), lockstep=False))


def use_what_failed(patch: pytest.MonkeyPatch) -> None:
    """A failure doesn't cancel the batch after it."""
    patch.setattr(BatchInFlight, "cancel", lambda self: None)
    patch.setattr(Scheduler, "cancel", lambda self, batch: None)


def test_a_stage_without_next_ids_is_computed_token_by_token(
    start: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    launch = GenerationStage.launch

    def without_next_ids(self: GenerationStage, part: Part, hidden: torch.Tensor) -> Launched:
        launched = launch(self, part, hidden)
        assert launched.next_ids is not None
        return Launched(None, launched.tensors | {"ids": launched.next_ids})

    collect = GenerationStage.collect
    monkeypatch.setattr(GenerationStage, "launch", without_next_ids)
    monkeypatch.setattr(
        GenerationStage,
        "collect",
        lambda self, part, tensors: collect(self, part, {**tensors, "next_ids": tensors["ids"]}),
    )
    made = [each for each in requests(3) if each[1] == "generation"][:4]
    alone = [answer(ticket) for ticket in submit(start(late=False, **OPTIONS), made)]
    assert_same([answer(ticket) for ticket in submit(start(late=True, **OPTIONS), made)], alone)


@pytest.mark.usefixtures("capturing")
def test_graphs_after_an_update_of_the_weights(
    start: Callable[..., Engine], zoo: Callable[[str], Path], tmp_path: Path
) -> None:
    """They are those of the new weights; also if the old ones couldn't be captured."""
    other = tmp_path / "other"
    shutil.copytree(zoo("llama"), other)
    tensors = load_file(other / "model.safetensors")
    save_file({name: tensor.flip(0) for name, tensor in tensors.items()}, other / "model.safetensors")
    made = [each for each in requests(5) if each[0] == 0]
    with Engine(str(other), dtype="float32", threads=1, **GRAPHS) as alone:
        expected = [answer(ticket) for ticket in submit(alone, made)]
    engine = start(late=True, **GRAPHS)
    before = [answer(ticket) for ticket in submit(engine, made)]
    assert [tokens for tokens, *_ in before] != [tokens for tokens, *_ in expected]
    name = lanes(engine)[0].served.name
    assert engine.call("update_weights", model=name, model_path=str(other))["success"]
    assert_same([answer(ticket) for ticket in submit(engine, made)], expected)
    assert lanes(engine)[0].runner.device.replays > 5


def test_a_row_that_is_not_finite_gives_the_next_pass_a_valid_id(
    start: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sampling gives -1 for it, with which the next pass has begun; a GPU would end the process."""
    engine = start(late=True, attention_backend="torch_native", **OPTIONS)
    lane = lanes(engine)[0]
    monkeypatch.setattr(lane.runner, "_model", Spoiled(lane.runner._model))
    made = [
        Submission(prompt=[5 + index, 9], params=GenerationParams(max_new_tokens=6), rid=str(index))
        for index in range(2)
    ]
    tickets = [engine.submit_all("generation", [each], model=lane.served.name)[0] for each in made]
    finished = [ticket.result(60).finish for ticket in tickets]
    assert [finish["type"] for finish in finished] == ["abort", "length"]
    assert Spoiled.smallest == 0


class Spoiled:
    """A model whose first row's hidden numbers aren't finite; the smallest id that it was given."""

    smallest = 99

    def __init__(self, model: Any) -> None:
        self.model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def forward(self, ids: torch.Tensor, positions: torch.Tensor, layout: Any, pool: Any, *rest: Any) -> torch.Tensor:
        Spoiled.smallest = min(Spoiled.smallest, int(ids.min()))
        hidden: torch.Tensor = self.model.forward(ids, positions, layout, pool, *rest)
        return hidden.index_fill(0, (ids == 5).nonzero()[:, 0], torch.nan)


BUGS = [keep_uploads, free_in_flight, read_the_wrong_row, overlap_lockstep, use_what_failed]


@pytest.mark.parametrize("bug", BUGS)
def test_hazards_of_overlap_are_caught(
    bug: Callable[[pytest.MonkeyPatch], None],
    start: Callable[..., Engine],
    zoo: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = start(late=False, attention_backend="torch_native", **OPTIONS)  # it checks indices
    with pytest.raises((AssertionError, EngineDown, TimeoutError)):  # noqa: PT012
        for seed in range(23, 43):
            with monkeypatch.context() as patch:
                storm(engine, [str(zoo(name)) for name in MODELS], seed, partial(bug, patch))
