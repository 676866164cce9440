"""Requests that wait for their stage's own work before they are admitted."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future
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
from trunkline.core.engine.device.cpu import CpuDevice
from trunkline.core.engine.lane import Lane
from trunkline.core.engine.loop import EngineLoop
from trunkline.core.engine.messages import Abort, Answer, Call, Progress, Stop, Submit
from trunkline.core.engine.runner import Runner
from trunkline.core.engine.scheduling.scheduler import Scheduler
from trunkline.core.errors import RequestError
from trunkline.core.types import Launched, ModelInfo, Needs, Part, Request, ServedModel, Stage, Step

PLUGIN = Plugin("slow", "slow", "slow-dist", "1.0")


class SlowParams(Struct):
    wait: bool = False
    wrong: bool = False


class SlowResult(Struct):
    pass


class Slow(Stage):
    """Prepares requests until the test sets their Future."""

    task = "slow"
    params = SlowParams
    result = SlowResult

    def __init__(self) -> None:
        self.futures: dict[str, Future[int]] = {}
        self.asked = threading.Semaphore(0)
        self.admitted: list[tuple[str, Any]] = []
        self.released: list[str] = []

    def before_admit(self, request: Request) -> Future[Any] | None:
        if request.params.wrong:
            return 5  # type: ignore[return-value]
        if not request.params.wait:
            return None
        request.state = self.futures[request.rid] = Future()
        self.asked.release()
        return request.state

    def admit(self, request: Request) -> Needs:
        self.admitted.append((request.rid, request.state.result() if request.state else None))
        return Needs()

    def launch(self, part: Part, hidden: torch.Tensor) -> Launched:
        return Launched()

    def collect(self, part: Part, tensors: Mapping[str, torch.Tensor]) -> Iterable[Step]:
        return [Step(row.request, finish={"type": "done"}) for row in part.rows if row.final]

    def probe(self) -> tuple[list[int], SlowParams]:
        return [1], SlowParams()

    def release(self, request: Request) -> None:
        self.released.append(request.rid)

    def close(self) -> None:
        for future in self.futures.values():
            if not future.done():
                future.set_exception(RequestError("It is over.", status=503))


class NoModel:
    token_types = False
    captures = False
    length_boundaries = ()
    length = 1

    def forward(self, ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return torch.zeros(len(ids), 1)


class Bench:
    """A loop on a thread, with one lane."""

    def __init__(self) -> None:
        self.stage = Slow()
        self.lane = make_lane(self.stage)
        self.replies: dict[int, Progress] = {}
        self.answers: list[Any] = []
        self.changed = threading.Condition()
        self.channel = LocalChannel(self.deliver)
        self.loop = EngineLoop([self.lane], self.channel)
        self.thread = threading.Thread(target=self.loop.run, daemon=True)
        self.thread.start()

    def deliver(self, messages: list[Any]) -> None:
        with self.changed:
            self.replies |= {each.key: each for each in messages if isinstance(each, Progress) and each.last}
            self.answers += [each.value for each in messages if isinstance(each, Answer)]
            self.changed.notify_all()

    def submit(self, key: int, **params: Any) -> None:
        ids = np.array([key], np.int32).tobytes()
        self.channel.post(Submit(key, "", "slow", f"r{key}", ids, Raw(msgspec.msgpack.encode(params))))

    def prepare(self, key: int) -> Future[int]:
        """Submit a request, and wait until its preparation was started."""
        self.submit(key, wait=True)
        assert self.stage.asked.acquire(timeout=20)
        return self.stage.futures[f"r{key}"]

    def wait(self, key: int) -> Progress:
        with self.changed:
            assert self.changed.wait_for(lambda: key in self.replies, 20)
            return self.replies[key]

    def flush(self) -> Any:
        """The answer to the control ``flush_cache``."""
        self.channel.post(Call(0, "flush_cache", "", {}))
        with self.changed:
            assert self.changed.wait_for(lambda: self.answers, 20)
            return self.answers.pop()

    def close(self) -> None:
        self.channel.post(Stop())
        self.thread.join(20)
        assert not self.thread.is_alive()


def make_lane(stage: Slow) -> Lane:
    info = ModelInfo(
        path="",
        architecture="NoModel",
        model_type="none",
        context_length=64,
        vocab_size=100,
        hidden_size=1,
        causal=True,
    )
    served = ServedModel(
        name="one", model_path="", tokenizer_path="", info=info, tasks={"slow": False}, max_total_tokens=64,
        max_running_requests=4, dtype="float32", attention_backend="cpu",
    )  # fmt: skip
    model: Any = NoModel()
    table = SlotTable(4, 64)
    stages = {"slow": CheckedStage(Provided(PLUGIN, stage), 100)}
    scheduler = Scheduler(SlotPool(64), table, RadixCache(), chunk=16, max_running=4, policy="fcfs")
    return Lane(served, model, stages, scheduler, Runner(model, stages, None, table, CpuDevice()))


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.close()


def test_others_are_served_while_a_request_is_prepared(bench: Bench) -> None:
    future = bench.prepare(1)
    bench.submit(2)
    assert bench.wait(2).finish == {"type": "done"}
    assert bench.loop.heartbeat().loads[0].waiting == 1
    assert not bench.flush()
    assert 1 not in bench.replies
    future.set_result(7)  # the loop waits for messages: this must wake it
    assert bench.wait(1).finish == {"type": "done"}
    assert bench.stage.admitted == [("r2", None), ("r1", 7)]
    assert bench.stage.released == ["r2", "r1"]
    assert bench.loop.requests == {}
    assert bench.loop.heartbeat().loads[0].waiting == 0
    assert bench.flush()


def test_what_failed_is_raised_by_admit(bench: Bench) -> None:
    bench.prepare(1).set_exception(RequestError("no such grammar", param="regex"))
    assert bench.wait(1).error == (400, "no such grammar", "regex")
    bench.prepare(2).set_exception(RuntimeError("a bug"))
    error = bench.wait(2).error
    assert error is not None
    assert error[0] == 500
    assert bench.stage.released == []
    assert bench.loop.requests == {}


def test_an_aborted_request_is_never_admitted(bench: Bench) -> None:
    future = bench.prepare(1)
    bench.channel.post(Abort(1))
    finish = bench.wait(1).finish
    assert finish is not None
    assert finish["message"] == "Abort in waiting queue"
    assert future.cancelled()
    bench.submit(2)
    bench.wait(2)
    assert bench.stage.admitted == [("r2", None)]


def test_an_abort_while_the_work_runs(bench: Bench) -> None:
    """Work that runs can't be cancelled; its end must not bring the request back."""
    future = bench.prepare(1)
    assert future.set_running_or_notify_cancel()
    bench.channel.post(Abort(1))
    bench.wait(1)
    future.set_result(1)
    bench.submit(2)
    bench.wait(2)
    assert bench.stage.admitted == [("r2", None)]


def test_a_pause_that_aborts_ends_them(bench: Bench) -> None:
    bench.prepare(1)
    bench.channel.post(Call(50, "pause", "", {"mode": "abort"}))
    finish = bench.wait(1).finish
    assert finish is not None
    assert finish["type"] == "abort"


def test_other_weights_mean_another_preparation(bench: Bench) -> None:
    former = bench.prepare(1)
    bench.stage = Slow()  # what a weight update does to the lane
    bench.lane.stages = {"slow": CheckedStage(Provided(PLUGIN, bench.stage), 100)}
    former.set_result(1)
    assert bench.stage.asked.acquire(timeout=20)
    bench.stage.futures["r1"].set_result(2)
    assert bench.wait(1).finish == {"type": "done"}
    assert bench.stage.admitted == [("r1", 2)]


def test_a_wrong_value_fails_the_request_and_names_the_plugin(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    bench.submit(1, wrong=True)
    error = bench.wait(1).error
    assert error is not None
    assert error[0] == 500
    assert "before_admit of task 'slow' returned int, not a concurrent.futures.Future" in caplog.text


def test_who_waits_when_the_engine_stops_gets_an_answer(bench: Bench) -> None:
    bench.prepare(1)
    bench.close()
    assert bench.wait(1).error == (503, "It is over.", None)
