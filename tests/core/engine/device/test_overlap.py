"""With a batch in flight while the next one is planned, results equal those of the synchronous engine."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from msgspec import structs
from safetensors.torch import load_file, save_file

from trunkline.core import Engine
from trunkline.core.engine.flight import BatchInFlight
from trunkline.core.engine.scheduling.scheduler import Scheduler
from trunkline.core.errors import EngineDown
from trunkline.core.types import Launched, Part, Request, Submission
from trunkline.plugins.generation.schemas import GenerationParams
from trunkline.plugins.generation.stage import GenerationStage

from .late import LateDevice, move
from .storms import (
    GRAPHS,
    MODELS,
    OPTIONS,
    TASKS,
    Plan,
    answer,
    assert_same,
    capture,
    lanes,
    plans,
    random_plan,
    requests,
    storm,
    submit,
)


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


@pytest.mark.usefixtures("capturing")
@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("seed", [10, 11, pytest.param(12, marks=pytest.mark.properties)])
def test_whatever_happens_answers_are_those_of_the_synchronous_engine(
    seed: int, graphs: bool, start: Callable[..., Engine], zoo: Callable[[str], Path]
) -> None:
    engine = start(late=False, **(GRAPHS if graphs else OPTIONS))
    assert storm(engine, [str(zoo(name)) for name in MODELS], random_plan(seed), graphs=graphs) > 4
    assert max(lane.runner.device.in_flight for lane in lanes(engine)) > 0
    assert (sum(lane.runner.device.replays for lane in lanes(engine)) > 0) == graphs


@pytest.mark.properties
@pytest.mark.timeout(3600)
@pytest.mark.usefixtures("capturing")
@pytest.mark.parametrize("number", range(10))
def test_any_storm(number: int, suite: Any, start: Callable[..., Engine], zoo: Callable[[str], Path]) -> None:
    graphs = number % 2 == 1
    options = GRAPHS if graphs else OPTIONS
    if number % 4 == 2:
        # Without this mode, last bits of attention may decide how a number is rounded.
        options = OPTIONS | {"quantization": "int8", "enable_deterministic_inference": True}
    engine, folders = start(late=False, **options), [str(zoo(name)) for name in MODELS]

    @hypothesis.seed(suite.random.randrange(10**9))
    @settings(max_examples=40, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(plan=plans())
    def equals(plan: Plan) -> None:
        storm(engine, folders, plan, graphs=graphs)

    equals()


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
    made = [each for each in requests(3) if TASKS[each[0]] == "generation"][:4]
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


@pytest.mark.properties
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("bug", BUGS)
def test_hazards_of_overlap_are_caught(
    bug: Callable[[pytest.MonkeyPatch], None],
    start: Callable[..., Engine],
    zoo: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = start(late=False, attention_backend="torch_native", **OPTIONS)  # it checks indices
    with pytest.raises((AssertionError, EngineDown, TimeoutError)):  # noqa: PT012
        for seed in range(23, 103):
            with monkeypatch.context() as patch:
                storm(engine, [str(zoo(name)) for name in MODELS], random_plan(seed), partial(bug, patch))
