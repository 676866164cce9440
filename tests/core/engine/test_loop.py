"""The loop with a model that needs no weights: admission, turns, failures, controls."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count, pairwise
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from msgspec import Raw, Struct

from trunkline.core.cache.pool import SlotPool, SlotTable
from trunkline.core.cache.radix import RadixCache
from trunkline.core.discovery import Plugin, Provided
from trunkline.core.engine.channel import LocalChannel
from trunkline.core.engine.contracts import CheckedStage
from trunkline.core.engine.control.checked import CheckedControl
from trunkline.core.engine.device.cpu import CpuDevice
from trunkline.core.engine.lane import Lane
from trunkline.core.engine.loop import EngineLoop
from trunkline.core.engine.messages import Abort, Answer, Call, Progress, Started, Stop, Submit
from trunkline.core.engine.pass_record import CAPACITY, PassRecord, shared_file
from trunkline.core.engine.runner import Runner
from trunkline.core.engine.scheduling.scheduler import Scheduler
from trunkline.core.errors import RequestError
from trunkline.core.types import Launched, ModelInfo, Needs, Part, Request, ServedModel, Stage, Step

PLUGIN = Plugin("counting", "counting", "counting-dist", "1.5")


class CountParams(Struct):
    steps: int = 3
    explode: str = ""  # where to raise, or which part of the contract to break


class CountResult(Struct):
    seen: int


class Count(Stage):
    """Each next token is the last one plus one."""

    task = "count"
    decodes = True
    params = CountParams
    result = CountResult

    def __init__(self) -> None:
        self.released: list[str] = []
        self.collected: list[str] = []

    def admit(self, request: Request) -> Needs:
        if request.params.explode == "admit":
            raise RequestError("no such luck", param="explode")
        return Needs(new_tokens=request.params.steps)

    def reset(self, request: Request) -> None:
        if request.params.explode == "reset":
            raise RuntimeError("reset")

    def launch(self, part: Part, hidden: torch.Tensor) -> Launched:
        if any(row.request.params.explode == "launch" for row in part.rows):
            raise RuntimeError("launch")
        return Launched(hidden[:, 0].long() + 1)

    def collect(self, part: Part, tensors: Mapping[str, torch.Tensor]) -> Iterable[Step]:
        for row, token in zip(part.rows, tensors["next_ids"].tolist(), strict=True):
            if row.request.params.explode == "collect":
                raise RuntimeError("collect")
            self.collected.append(row.request.rid)
            last = row.request.output_len + 1 >= row.request.params.steps
            yield from self.steps(row.request, token, {"type": "length"} if last else None)

    def steps(self, request: Request, token: int, finish: dict[str, Any] | None) -> Iterable[Step]:
        """One right step, unless the request asks for a wrong one."""
        match request.params.explode:
            case "silent":
                return
            case "flood":
                yield Step(request, (token,) * 99)
            case "unsendable data":
                yield Step(request, (token,), data=CountResult(np.int64(token)))  # type: ignore[arg-type]
            case "unsendable finish":
                yield Step(request, (token,), finish={"type": np.int64(token)})
            case "not finite":
                yield Step(request, finish={"type": "abort", "message": "NaN", "status_code": 500})
            case _:
                yield Step(request, (token,), data=CountResult(token), finish=finish)
        if request.params.explode == "again" and finish:
            yield Step(request, (token,), finish=finish)

    def probe(self) -> tuple[list[int], CountParams]:
        return [0], CountParams(steps=1)

    def release(self, request: Request) -> None:
        self.released.append(request.rid)


class Echo:
    """Hidden row = (token id, position)."""

    device = torch.device("cpu")
    token_types = captures = False
    length_boundaries = ()

    def __init__(self) -> None:
        self.before: Callable[[torch.Tensor], None] = lambda ids: None

    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor, layout: Any, pool: Any, types: Any, wanted: Any, *_: Any
    ) -> torch.Tensor:
        self.before(input_ids)
        hidden = torch.stack([input_ids, positions], 1).float()
        return hidden if wanted is None else hidden[wanted]


def make_lane(name: str, slots: int = 64, chunk: int | None = 8, running: int = 4) -> Lane:
    info = ModelInfo(
        path="", architecture="Echo", model_type="", context_length=slots, vocab_size=100, hidden_size=2, causal=True
    )
    served = ServedModel(
        name=name,
        model_path=name,
        tokenizer_path=name,
        info=info,
        tasks={"count": True},
        max_total_tokens=slots,
        max_running_requests=running,
        dtype="float32",
        attention_backend="none",
    )
    model, stage, table = Echo(), Count(), SlotTable(running, slots)
    scheduler = Scheduler(SlotPool(slots), table, RadixCache(), chunk=chunk, max_running=running, policy="fcfs")
    stages = {"count": CheckedStage(Provided(PLUGIN, stage), vocabulary=100)}
    ticks = count()  # every pass takes as long as any other
    return Lane(
        served, model, stages, scheduler, Runner(model, stages, None, table, CpuDevice()), clock=lambda: next(ticks)
    )


@dataclass
class Bench:
    """A loop on a thread, and what it said."""

    lanes: list[Lane]
    controls: dict[str, Callable[..., Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.replies: dict[int, list[Any]] = {}
        self.started: list[int] = []
        self.changed = threading.Condition()
        self.channel = LocalChannel(self.deliver)
        controls = {name: CheckedControl(name, Provided(PLUGIN, control)) for name, control in self.controls.items()}
        self.record = PassRecord()
        self.loop = EngineLoop(self.lanes, self.channel, controls, record=self.record)
        self.thread = threading.Thread(target=self.loop.run, daemon=True)
        self.thread.start()

    def deliver(self, messages: list[Any]) -> None:
        with self.changed:
            for message in messages:
                if isinstance(message, Progress | Answer):
                    self.replies.setdefault(message.key, []).append(message)
                elif isinstance(message, Started):
                    self.started.append(message.key)
            self.changed.notify_all()

    def submit(
        self,
        key: int,
        prompt: list[int],
        model: str = "",
        task: str = "count",
        second_at: int | None = None,
        alone: bool = False,
        **params: Any,
    ) -> None:
        raw, ids = Raw(msgspec.msgpack.encode(params)), np.asarray(prompt, np.int32).tobytes()
        self.channel.post(Submit(key, model, task, f"r{key}", ids, raw, second_at=second_at, alone=alone))

    def wait(self, key: int) -> list[Any]:
        """All messages on ``key``, once the last one is there."""

        def over() -> bool:
            last = self.replies.get(key, [None])[-1]
            return isinstance(last, Answer) or (last is not None and (last.finish or last.error) is not None)

        with self.changed:
            assert self.changed.wait_for(over, 20), f"no end of {key}: {self.replies.get(key)}"
            return self.replies[key]

    def tokens(self, key: int) -> list[int]:
        return [token for message in self.wait(key) for token in message.tokens]

    def error(self, key: int) -> tuple[int, str, str | None]:
        error: tuple[int, str, str | None] = self.wait(key)[-1].error
        return error

    def close(self) -> None:
        self.channel.post(Stop())
        self.thread.join(20)
        assert not self.thread.is_alive()


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench([make_lane("one"), make_lane("two")])
    yield bench
    bench.close()


def stage_of(bench: Bench, index: int = 0) -> Count:
    stage = bench.lanes[index].stages["count"].stage
    assert isinstance(stage, Count)
    return stage


def test_a_request_runs_to_its_end_and_leaves_nothing(bench: Bench) -> None:
    bench.submit(1, [10, 11], steps=4)
    assert bench.tokens(1) == [12, 13, 14, 15]
    last = bench.wait(1)[-1]
    assert last.finish == {"type": "length"}
    assert msgspec.msgpack.decode(last.data, type=CountResult) == CountResult(15)
    assert bench.started == [1]
    assert stage_of(bench).released == ["r1"]
    assert bench.loop.requests == {}
    assert bench.lanes[0].scheduler.flush()
    assert bench.lanes[0].scheduler.free_slots() == 64


def test_a_prompt_longer_than_the_chunk_and_a_second_run_from_cache(bench: Bench) -> None:
    prompt = list(range(20, 40))
    bench.submit(1, prompt, steps=2)
    assert bench.tokens(1) == [40, 41]
    bench.submit(2, prompt, steps=2)
    assert bench.tokens(2) == [40, 41]
    assert bench.wait(1)[-1].cached == 0
    assert bench.wait(2)[-1].cached == 19


def test_models_are_addressed_by_name_and_the_first_is_primary(bench: Bench) -> None:
    bench.submit(1, [5], model="two", steps=1)
    bench.submit(2, [6], model="nowhere", steps=1)
    bench.submit(3, [7], steps=1)
    assert bench.tokens(1) == [6]
    assert bench.tokens(3) == [8]
    assert bench.error(2) == (400, "There is no model named 'nowhere'; loaded: one, two.", "model")
    assert stage_of(bench, 1).released == ["r1"]


@pytest.mark.parametrize(
    ("prompt", "params", "words"),
    [
        ([1], {"explode": "admit"}, "no such luck"),
        ([], {}, "no tokens"),
        ([100], {}, "outside the vocabulary; ids lie in [0, 100)"),
        ([5, -1], {}, "outside the vocabulary"),
        (list(range(60)), {"steps": 9}, "holds at most 64"),
        ([1], {"steps": "many"}, "Expected `int`"),
    ],
)
def test_a_bad_request_is_refused_and_the_next_is_fine(
    bench: Bench, prompt: list[int], params: dict[str, Any], words: str
) -> None:
    bench.submit(1, prompt, **params)
    status, message, _ = bench.error(1)
    assert status == 400
    assert words in message
    bench.submit(2, [3], steps=1)
    assert bench.tokens(2) == [4]
    assert len(stage_of(bench).released) == (
        2 if params.get("steps") == 9 or not prompt else 1  # only what the stage had admitted
    )


@pytest.mark.parametrize("where", ["launch", "collect"])
def test_a_failure_ends_the_request_that_caused_it_and_no_other(bench: Bench, where: str) -> None:
    gate = threading.Event()
    bench.lanes[0].model.before = lambda ids: gate.wait(20)  # all four meet in one batch
    bench.submit(1, [1], steps=1)
    for key in (2, 3, 4):
        bench.submit(key, [10 * key], steps=3, explode=where if key == 3 else "")
    gate.set()
    status, message, _ = bench.error(3)
    assert status == 500
    assert "inside the engine" in message
    assert bench.tokens(2) == [21, 22, 23]
    assert bench.tokens(4) == [41, 42, 43]
    assert sorted(stage_of(bench).released) == ["r1", "r2", "r3", "r4"]
    assert stage_of(bench).collected.count("r2") == 3  # no step was collected twice
    assert bench.lanes[0].scheduler.flush()
    assert bench.lanes[0].scheduler.free_slots() == 64


@pytest.mark.parametrize("how", ["silent", "flood", "unsendable data", "unsendable finish"])
def test_a_stage_that_breaks_its_contract_loses_the_request_and_nothing_else(bench: Bench, how: str) -> None:
    bench.submit(1, [10], steps=3, explode=how)
    bench.submit(2, [20], steps=3)
    assert bench.error(1)[0] == 500
    assert bench.tokens(2) == [21, 22, 23]
    assert sorted(stage_of(bench).released) == ["r1", "r2"]
    assert bench.loop.requests == {}
    assert bench.lanes[0].scheduler.idle


def test_a_step_after_the_last_one_is_dropped(bench: Bench) -> None:
    bench.submit(1, [10], steps=2, explode="again")
    assert bench.tokens(1) == [11, 12]
    assert stage_of(bench).released == ["r1"]


def test_a_reset_that_fails_ends_the_retracted_request_only() -> None:
    bench = Bench([make_lane("one", slots=16, chunk=16)])
    bench.lanes[0].scheduler.reserve.ratio = 0.0  # optimistic, so that the pool does run dry
    gate = threading.Event()
    bench.lanes[0].model.before = lambda ids: gate.wait(20)
    bench.submit(1, [10], steps=12)
    bench.submit(2, [50], steps=12, explode="reset")
    gate.set()
    assert bench.tokens(1) == list(range(11, 23))
    assert bench.error(2)[0] == 500
    assert sorted(stage_of(bench).released) == ["r1", "r2"]
    bench.close()


def test_a_defect_of_the_loop_itself_ends_it_and_closes_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()
    channel = LocalChannel(lambda messages: None)
    loop = EngineLoop([make_lane("one")], channel)
    monkeypatch.setattr(loop, "turn", lambda: 1 / 0)
    monkeypatch.setattr(channel, "close", over.set)
    with pytest.raises(ZeroDivisionError):
        loop.run()
    assert over.is_set()


@pytest.mark.parametrize("how", ["launch", "not finite"])
def test_what_a_failed_request_computed_is_not_cached(bench: Bench, how: str) -> None:
    bench.submit(1, [1, 2, 3, 4], explode=how)
    bench.wait(1)
    bench.submit(2, [1, 2, 3, 4], steps=1)
    assert bench.tokens(2) == [5]
    assert bench.wait(2)[-1].cached == 0


def test_abort_waiting_and_running(bench: Bench) -> None:
    gate, inside = threading.Event(), threading.Event()

    def hold(ids: torch.Tensor) -> None:
        inside.set()
        gate.wait(20)

    bench.lanes[0].model.before = hold
    bench.submit(1, [1], steps=50)
    inside.wait(20)
    bench.submit(2, [1], steps=50)
    bench.channel.post(Abort(2))
    bench.channel.post(Abort(1))
    bench.channel.post(Abort(99))  # unknown: nothing happens
    gate.set()
    assert bench.wait(1)[-1].finish == {
        "type": "abort", "message": "Aborted", "status_code": None, "err_type": None
    }  # fmt: skip
    assert bench.loop.passes <= 2, "the engine went on computing for a request that was aborted"
    assert bench.wait(2)[-1].finish["message"] == "Abort in waiting queue"
    assert bench.lanes[0].scheduler.flush()
    assert bench.lanes[0].scheduler.free_slots() == 64
    assert sorted(stage_of(bench).released) == ["r1", "r2"]


def test_controls_run_between_batches_with_the_model_and_arguments() -> None:
    def fail(model: Any) -> None:
        raise RequestError("not now", status=409)

    bench = Bench(
        [make_lane("one")], {"double": lambda model, value: 2 * value, "fail": fail, "model": lambda model: model}
    )
    calls = ((1, "double", {"value": 21}), (2, "fail", {}), (3, "absent", {}), (4, "probe", {}), (5, "model", {}))
    for key, control, arguments in calls:
        bench.channel.post(Call(key, control, "", arguments))
    assert bench.wait(1)[-1].value == 42
    assert bench.error(2) == (409, "not now", None)
    assert bench.error(3)[0] == 404
    assert bench.error(5)[0] == 500  # a model can't be sent
    assert bench.wait(4)[-1].value == {"type": "length"}
    bench.close()


def test_a_control_counts_as_a_pass_for_the_watchdog() -> None:
    began: list[float] = []
    bench = Bench([make_lane("one")], {"look": lambda model: began.append(bench.loop._busy_since)})
    bench.channel.post(Call(1, "look", "", {}))
    bench.wait(1)
    assert began[0] > 0
    bench.close()
    assert bench.loop._busy_since == 0


def test_flush_is_refused_while_anything_runs(bench: Bench) -> None:
    gate, inside = threading.Event(), threading.Event()

    def hold(ids: torch.Tensor) -> None:
        inside.set()
        gate.wait(20)

    bench.lanes[0].model.before = hold
    bench.submit(1, [1, 2, 3], steps=5)
    inside.wait(20)
    bench.channel.post(Call(7, "flush_cache", "", {}))
    gate.set()
    assert bench.wait(7)[-1].value is False
    bench.wait(1)
    bench.channel.post(Call(8, "flush_cache", "", {}))
    assert bench.wait(8)[-1].value is True


def test_probes_neither_fill_nor_use_the_cache(bench: Bench) -> None:
    bench.channel.post(Call(1, "probe", "", {}))
    bench.wait(1)
    bench.submit(2, [0, 0, 0], steps=1)
    bench.wait(2)
    assert bench.wait(2)[-1].cached == 0


@pytest.mark.parametrize(("types", "cached"), [(True, 0), (False, 3)])
def test_pairs_of_models_with_token_types_are_not_cached(bench: Bench, types: bool, cached: int) -> None:
    """The tree knows prefixes by their ids; the same ids are something else in the second text."""
    bench.lanes[0].model.token_types = types
    bench.submit(1, [7, 8, 9, 10], steps=1)
    bench.wait(1)
    bench.submit(2, [7, 8, 9, 10], steps=1, second_at=2)
    assert bench.wait(2)[-1].cached == cached
    bench.submit(3, [7, 8, 9, 10], steps=1)
    assert bench.wait(3)[-1].cached == 3


def test_a_saturated_model_does_not_starve_another() -> None:
    order: list[str] = []
    lanes = [make_lane("busy", slots=4096, running=64), make_lane("calm")]
    for lane in lanes:
        lane.model.before = lambda ids, name=lane.served.name: order.append(name) or threading.Event().wait(0.002)  # type: ignore[func-returns-value]
    bench = Bench(lanes)
    for key in range(1, 33):
        bench.submit(key, [key], model="busy", steps=60)
    while len(order) < 20:
        threading.Event().wait(0.001)
    mark = len(order)
    bench.submit(100, [1], model="calm", steps=10)
    bench.wait(100)
    calm = [index for index, name in enumerate(order) if name == "calm"]
    assert calm[0] - mark <= 3  # one message may arrive after a pass was chosen
    assert max(b - a for a, b in pairwise(calm)) <= 3
    bench.close()


# -- what the front learns of an engine that is lost -----------------------------------------


@pytest.mark.field
def test_every_forward_pass_is_noted_before_it_runs(bench: Bench) -> None:
    gate = threading.Event()
    seen: list[tuple[list[int], list[int]]] = []  # ids that are computed, keys that are noted

    def look(ids: torch.Tensor) -> None:
        gate.wait(20)
        seen.append((ids.tolist(), bench.record.keys()))

    bench.lanes[0].model.before = look
    bench.submit(1, [10], steps=1)
    for key in (2, 3, 4):
        bench.submit(key, [10 * key], steps=1, explode="launch" if key == 3 else "")
    gate.set()
    for key in (1, 2, 3, 4):
        bench.wait(key)
    assert all([number // 10 for number in ids] == keys for ids, keys in seen)
    assert max(len(keys) for _, keys in seen) > 1
    assert ([30], [3]) in seen  # run again alone
    bench.channel.post(Call(9, "flush_cache", "", {}))
    bench.wait(9)
    bench.close()
    assert bench.record.keys() == []  # nothing is worked on any more


@pytest.mark.field
def test_requests_and_calls_are_noted_while_they_are_handled(monkeypatch: pytest.MonkeyPatch) -> None:
    noted: list[list[int]] = []
    bench = Bench([make_lane("one")], {"look": lambda model: noted.append(bench.record.keys())})
    admit = bench.lanes[0].admit
    monkeypatch.setattr(bench.lanes[0], "admit", lambda request: (noted.append(bench.record.keys()), admit(request)))
    bench.channel.post(Call(7, "look", "", {}))
    bench.submit(8, [1], steps=1)
    bench.wait(8)
    bench.close()
    assert noted == [[7], [8]]


@pytest.mark.field
def test_a_request_that_runs_alone_shares_no_forward_pass(bench: Bench) -> None:
    gate = threading.Event()
    seen: list[list[int]] = []

    def look(ids: torch.Tensor) -> None:
        gate.wait(20)
        seen.append(bench.record.keys())

    bench.lanes[0].model.before = look
    bench.submit(1, [10], steps=1)
    bench.submit(2, [20], steps=3)
    bench.submit(3, [30, 31, 32], steps=3, alone=True)
    bench.submit(4, [40], steps=3)
    gate.set()
    assert [bench.tokens(key) for key in (2, 3, 4)] == [[21, 22, 23], [33, 34, 35], [41, 42, 43]]
    assert [2, 4] in seen
    assert [3] in seen
    assert all(keys == [3] for keys in seen if 3 in keys)
    bench.wait(1)
    assert bench.lanes[0].scheduler.flush()
    assert bench.lanes[0].scheduler.free_slots() == 64


def test_a_record_is_read_through_another_mapping_and_holds_so_many_keys() -> None:
    with shared_file() as file:
        mine, theirs = PassRecord(file.fileno()), PassRecord(file.fileno())
    assert theirs.keys() == []
    mine.note([5, -6, 1 << 60])
    assert theirs.keys() == [5, -6, 1 << 60]
    mine.note([7])
    assert theirs.keys() == [7]
    mine.note(list(range(CAPACITY + 9)))
    assert theirs.keys() == list(range(CAPACITY))
