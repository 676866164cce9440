"""A plugin that breaks its contract loses the request, and nobody else notices."""

# mypy: disable-error-code="arg-type, dict-item"
# (values are wrong on purpose)

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from msgspec import Struct

from trunkline.core.cache.pool import SlotPool, SlotTable
from trunkline.core.cache.radix import RadixCache
from trunkline.core.discovery import Plugin, Provided
from trunkline.core.engine.contracts import CheckedStage
from trunkline.core.engine.control.checked import CheckedControl
from trunkline.core.engine.device.cpu import CpuDevice
from trunkline.core.engine.lane import Lane
from trunkline.core.engine.loop import EngineLoop
from trunkline.core.engine.messages import Abort, Answer, Call, Progress, Stop, Submit, encoder
from trunkline.core.engine.runner import Runner
from trunkline.core.engine.scheduling.scheduler import Scheduler
from trunkline.core.errors import PluginError, RequestError
from trunkline.core.types import MAX_FAILURES, Launched, ModelInfo, Needs, Part, Request, ServedModel, Stage, Step

pytestmark = pytest.mark.field

SLOTS, VOCABULARY = 64, 100
PLUGIN = Plugin("shouting", "shouting", "shouting-dist", "1.5")
NAMED = "plugin 'shouting' (shouting-dist 1.5): "


class Params(Struct):
    """``bad``: the request for which the stage does what the test gave it."""

    bad: bool = False
    steps: int = 3


class Result(Struct):
    seen: Any = None
    count: int = 0


class Shout(Stage):
    """Each next token is the last one plus one. ``replaced`` are methods for requests that are ``bad``."""

    task = "shout"
    decodes = True
    params = Params
    result = Result

    def __init__(self) -> None:
        self.replaced: dict[str, Callable[..., Any]] = {}
        self.held: list[str] = []  # admitted and not released

    def _act(self, method: str, requests: Iterable[Request], *arguments: Any) -> Any:
        """What the test wants this method to do for a bad request; None for others."""
        if method in self.replaced and any(request.params.bad for request in requests):
            return self.replaced[method](*arguments)
        return None

    def admit(self, request: Request) -> Needs:
        self.held.append(request.rid)
        try:
            needs = self._act("admit", [request])
        except BaseException:
            self.held.remove(request.rid)
            raise
        return Needs(new_tokens=request.params.steps) if needs is None else needs

    def prepare(self, part: Part) -> None:
        self._act("prepare", [row.request for row in part.rows])

    def launch(self, part: Part, hidden: torch.Tensor) -> Launched:
        launched = self._act("launch", [row.request for row in part.rows])
        return Launched(hidden[:, 0].long() + 1) if launched is None else launched

    def collect(self, part: Part, tensors: Mapping[str, torch.Tensor]) -> Iterable[Step]:
        for row, token in zip(part.rows, tensors["next_ids"].tolist(), strict=True):
            step = self._act("collect", [row.request], row.request, token)
            if step is not None:
                yield from step
            else:
                last = row.request.output_len + 1 >= row.request.params.steps
                yield Step(row.request, (token,), Result(token), {"type": "length"} if last else None)

    def probe(self) -> tuple[list[int], Params]:
        return self.replaced["probe"]() if "probe" in self.replaced else ([0], Params(steps=1))

    def release(self, request: Request) -> None:
        self.held.remove(request.rid)
        self._act("release", [request])


class Echo:
    device = torch.device("cpu")
    token_types = captures = False
    length_boundaries = ()

    def forward(
        self, ids: torch.Tensor, positions: torch.Tensor, layout: Any, pool: Any, types: Any, wanted: Any, *_: Any
    ) -> torch.Tensor:
        hidden = torch.stack([ids, positions], 1).float()
        return hidden if wanted is None else hidden[wanted]


class Bench:
    """A loop that is turned by hand, and what it said."""

    def __init__(self) -> None:
        info = ModelInfo(
            path="", architecture="Echo", model_type="", context_length=SLOTS, vocab_size=VOCABULARY, hidden_size=2,
            causal=True,
        )  # fmt: skip
        served = ServedModel(
            name="m", model_path="m", tokenizer_path="m", info=info, tasks={"shout": True}, max_total_tokens=SLOTS,
            max_running_requests=8, dtype="float32", attention_backend="none",
        )  # fmt: skip
        self.stage, table = Shout(), SlotTable(8, SLOTS)
        self.scheduler = Scheduler(SlotPool(SLOTS), table, RadixCache(), chunk=8, max_running=8, policy="fcfs")
        self.checked = CheckedStage(Provided(PLUGIN, self.stage), VOCABULARY)
        stages = {"shout": self.checked}
        lane = Lane(served, Echo(), stages, self.scheduler, Runner(Echo(), stages, None, table, CpuDevice()))
        self.sent: list[Any] = []
        self.inbox: list[Any] = []
        self.controls: dict[str, Any] = {}
        self.loop = EngineLoop([lane], self, self.controls)
        self._keys = iter(range(1, 10000))

    def receive(self, *, wait: bool) -> list[Any]:
        messages, self.inbox = self.inbox, []
        return messages

    def send(self, messages: list[Any]) -> None:
        encoder.encode(messages)  # as the socket would
        self.sent += messages

    def wake(self) -> None: ...

    def close(self) -> None: ...

    def submit(self, prompt: int, *, bad: bool = False, steps: int = 3, length: int = 1) -> int:
        key = next(self._keys)
        ids = np.full(length, prompt, np.int32).tobytes()
        params = encoder.encode(Params(bad, steps))
        self.inbox.append(Submit(key, "", "shout", f"r{key}", ids, params))
        return key

    def call(self, control: str, **arguments: Any) -> Answer:
        key = next(self._keys)
        self.inbox.append(Call(key, control, "", arguments))
        self.run()
        (answer,) = [message for message in self.sent if isinstance(message, Answer) and message.key == key]
        return answer

    def run(self) -> None:
        """Turn until nothing is left to do."""
        self.loop.turn()
        while any(lane.busy for lane in self.loop.lanes):
            self.loop.turn()

    def outcome(self, key: int) -> tuple[list[int], Any]:
        """A request's tokens, and how it ended: its finish reason or its error's status."""
        own = [message for message in self.sent if isinstance(message, Progress) and message.key == key]
        tokens = [token for message in own for token in message.tokens]
        last = own[-1]
        return tokens, last.finish if last.error is None else last.error[0]

    def check_clean(self) -> None:
        """Slots, queue and stage hold nothing any more."""
        assert self.scheduler.idle
        assert self.scheduler.free_slots() == SLOTS
        assert self.loop.requests == {}
        assert self.stage.held == []
        assert self.scheduler.flush()


@pytest.fixture
def bench() -> Bench:
    return Bench()


def fails_alone(bench: Bench, caplog: pytest.LogCaptureFixture, words: str, length: int = 1) -> None:
    """A bad request among good ones fails with a 500, its log line has ``words``, and the others are right."""
    good = bench.submit(10), bench.submit(20)
    bad = bench.submit(30, bad=True, length=length)
    other = bench.submit(40)
    bench.run()
    assert bench.outcome(bad)[1] == 500
    for key, first in zip((*good, other), (11, 21, 41), strict=True):
        assert bench.outcome(key) == ([first, first + 1, first + 2], {"type": "length"})
    assert any(words in record.getMessage() for record in caplog.records), caplog.text
    bench.check_clean()
    assert bench.call("probe").value == {"type": "length"}


def raises(error: BaseException) -> Callable[..., Any]:
    def function(*_: Any) -> Any:
        raise error

    return function


class Unprintable(Exception):
    def __str__(self) -> str:
        raise SystemExit


ERRORS = [
    SystemExit(1),
    KeyboardInterrupt(),
    GeneratorExit(),
    MemoryError(),
    RecursionError(),
    ValueError("odd"),
    StopIteration(),
    Unprintable(),
    RequestError("odd", status="500"),
    RequestError(5),
    RequestError("odd", status=200),
    RequestError("odd", param=3),
]


@pytest.mark.parametrize("error", ERRORS, ids=repr)
@pytest.mark.parametrize("method", ["admit", "prepare", "launch", "collect"])
def test_whatever_a_stage_raises_ends_one_request(
    bench: Bench, caplog: pytest.LogCaptureFixture, method: str, error: BaseException
) -> None:
    bench.stage.replaced[method] = raises(error)
    fails_alone(bench, caplog, f"{NAMED}{method} of task 'shout' raised ")


def test_a_request_error_of_admit_is_the_client_s(bench: Bench) -> None:
    bench.stage.replaced["admit"] = raises(RequestError("too loud", status=422, param="text"))
    key = bench.submit(1, bad=True)
    bench.run()
    assert bench.sent[-1].key == key
    assert bench.sent[-1].error == (422, "too loud", "text")


def test_a_release_that_raises_harms_nobody(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    bench.stage.replaced["release"] = raises(SystemExit())
    key = bench.submit(1, bad=True)
    bench.run()
    assert bench.outcome(key) == ([2, 3, 4], {"type": "length"})
    assert f"{NAMED}release of task 'shout' raised SystemExit" in caplog.text
    bench.check_clean()


@pytest.mark.parametrize(
    "error", [SystemExit(1), KeyboardInterrupt(), ValueError("odd"), RequestError("odd")], ids=repr
)
def test_a_reset_that_raises_ends_the_retracted_request(
    bench: Bench, caplog: pytest.LogCaptureFixture, error: BaseException
) -> None:
    bench.stage.reset = raises(error)  # type: ignore[method-assign]
    bench.scheduler.reserve.ratio = 0.0  # optimistic, so that the pool does run dry
    keys = [bench.submit(number, steps=40) for number in (1, 2)]
    bench.run()
    assert [bench.outcome(key)[1] for key in keys] == [{"type": "length"}, 500]
    assert f"{NAMED}reset of task 'shout' raised" in caplog.text
    bench.check_clean()


@pytest.mark.parametrize(
    "needs",
    [
        3,
        "needs",
        (3, None, None, False),
        Needs(new_tokens="3"),
        Needs(new_tokens=-1),
        Needs(new_tokens=2.5),
        Needs(new_tokens=None),
        Needs(new_tokens=np.int64(3)),
        Needs(new_tokens=torch.tensor(3)),
        Needs(3, rows_from=-1),
        Needs(3, rows_from=9),
        Needs(3, rows_from="0"),
        Needs(3, rows_up_to=1),
        Needs(3, rows_from=1, rows_up_to=1),
        Needs(3, rows_from=0, rows_up_to=1.0),
        Needs(3, reuse_up_to=-1),
        Needs(3, reuse_up_to=1.0),
        Needs(3, lockstep="no"),
        Needs(3, lockstep=None),
    ],
    ids=repr,
)
def test_wrong_needs_end_one_request(bench: Bench, caplog: pytest.LogCaptureFixture, needs: Any) -> None:
    bench.stage.replaced["admit"] = lambda: needs
    fails_alone(bench, caplog, f"{NAMED}admit of task 'shout' returned ", length=4)


def test_a_request_that_needs_more_than_there_is_is_the_client_s_error(bench: Bench) -> None:
    bench.stage.replaced["admit"] = lambda: Needs(new_tokens=1 << 80)
    key = bench.submit(1, bad=True)
    bench.run()
    assert bench.outcome(key)[1] == 400
    bench.check_clean()


ONE = torch.zeros(1, dtype=torch.int64)


@pytest.mark.parametrize(
    "launched",
    [
        5,
        [],
        {"next_ids": ONE},
        ONE,
        Launched([1]),
        Launched(torch.zeros(1)),
        Launched(torch.zeros(9, dtype=torch.int64)),
        Launched(ONE[:, None]),
        Launched(torch.zeros(1, dtype=torch.int32)),
        Launched(ONE, {"a": [1]}),
        Launched(ONE, [ONE]),
        Launched(ONE, None),
    ],
    ids=repr,
)
def test_a_wrong_launch_ends_one_request(bench: Bench, caplog: pytest.LogCaptureFixture, launched: Any) -> None:
    bench.stage.replaced["launch"] = lambda: launched
    fails_alone(bench, caplog, f"{NAMED}launch of task 'shout' returned ")


def wrong(**fields: Any) -> Callable[[Request, int], list[Any]]:
    """A step with these fields for the request that it is asked for."""
    return lambda request, token: [Step(**{"request": request, "tokens": (token,), **fields})]


LOOP: list[Any] = []
LOOP.append(LOOP)


@pytest.mark.parametrize(
    "fields",
    [
        {"tokens": ("1",)},
        {"tokens": (1.0,)},
        {"tokens": (-1,)},
        {"tokens": (VOCABULARY,)},
        {"tokens": 7},
        {"tokens": None},
        {"tokens": (np.int64(1),)},
        {"tokens": torch.tensor([1])},
        {"tokens": np.array([1])},
        {"tokens": {1}},
        {"tokens": (True,)},
        {"tokens": (1 << 70,)},
        {"tokens": (1,) * 99},
        {"finish": "stop"},
        {"finish": True},
        {"finish": {}},
        {"finish": {"type": None}},
        {"finish": {"type": np.str_("a"), "n": np.int64(1)}},
        {"finish": {"type": "stop", 1: 2}},
        {"finish": [("type", "stop")]},
        {"finish": {"type": "stop", "matched": object()}},
        {"finish": {"type": "stop", "matched": {(1, (2,)): 3, (): []}}},
        {"finish": {"type": "stop", "matched": "\ud800"}},
        {"finish": {"type": "stop", "matched": LOOP}},
        {"error": "wrong"},
        {"error": ValueError("wrong")},
        {"error": RequestError("wrong", status=0)},
        {"error": RequestError("\ud800")},
        {"data": 5},
        {"data": "text"},
        {"data": object()},
        {"data": Result(count="many")},
        {"data": Result(np.int64(1))},
        {"data": Result(LOOP)},
        {"data": Result("\ud800")},
        {"data": Result(1 << 70)},
        {"data": Result(b"x" * 99)},
        {"data": [Result()]},
    ],
    ids=lambda fields: re.sub(" at 0x[0-9a-f]*", "", repr(fields))[:60],  # the same in all processes
)
def test_a_wrong_step_ends_one_request(
    bench: Bench, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any]
) -> None:
    monkeypatch.setattr("trunkline.core.engine.checks.MAX_RESULT", 90)
    bench.stage.replaced["collect"] = wrong(**fields)
    fails_alone(bench, caplog, f"{NAMED}collect of task 'shout' gave ")


class Postponing:
    """Postpones each token of bad requests twice."""

    def __init__(self) -> None:
        self.asked = 0
        self.inputs: list[int] = []

    def collect(self, request: Request, token: int) -> list[Step]:
        self.asked += 1
        self.inputs.append(token)
        if self.asked % 3:
            return [Step(request, postponed=True)]
        last = request.output_len + 1 >= request.params.steps
        return [Step(request, (token,), finish={"type": "length"} if last else None)]


@pytest.mark.parametrize("length", [1, 20])
def test_a_postponed_row_is_computed_again(bench: Bench, length: int) -> None:
    """Also the last chunk of a prompt, of 8 tokens at most. The other requests go on."""
    postponing = Postponing()
    bench.stage.replaced |= {"admit": lambda: Needs(new_tokens=3, lockstep=True), "collect": postponing.collect}
    bad, good = bench.submit(30, bad=True, length=length), bench.submit(10)
    bench.run()
    assert bench.outcome(bad) == ([31, 32, 33], {"type": "length"})
    assert postponing.inputs == [31] * 3 + [32] * 3 + [33] * 3
    assert bench.outcome(good) == ([11, 12, 13], {"type": "length"})
    ends = {message.key: index for index, message in enumerate(bench.sent)}
    assert ends[good] < ends[bad]
    bench.check_clean()


def test_a_request_that_is_postponed_often_is_left_out_of_batches(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here time stands still: it rests as long as others run, and is computed again when it is alone."""
    monkeypatch.setattr("trunkline.core.engine.scheduling.waiting.time.monotonic", lambda: 1.0)
    postponing = Postponing()
    bench.stage.replaced |= {"admit": lambda: Needs(new_tokens=3, lockstep=True), "collect": postponing.collect}
    bad = bench.submit(30, bad=True)
    good = [bench.submit(10 * index, steps=9) for index in (1, 2)]
    for _ in range(7):
        bench.loop.turn()
    assert postponing.asked == 2
    bench.run()
    assert bench.outcome(bad) == ([31, 32, 33], {"type": "length"})
    assert all(bench.outcome(key)[1] == {"type": "length"} for key in good)
    bench.check_clean()


def test_a_postponed_request_can_be_aborted_and_retracted(bench: Bench) -> None:
    postponing = Postponing()
    bench.stage.replaced |= {"admit": lambda: Needs(new_tokens=3, lockstep=True), "collect": postponing.collect}
    keys = bench.submit(30, bad=True), bench.submit(40, bad=True)
    for _ in range(3):
        bench.loop.turn()
    bench.inbox.append(Abort(keys[0]))
    bench.loop.turn()
    bench.loop.pipeline.drain()
    assert bench.loop.lanes[0].retract() == []
    bench.run()
    assert bench.outcome(keys[0])[1]["type"] == "abort"
    assert bench.outcome(keys[1]) == ([41, 42, 43], {"type": "length"})
    bench.check_clean()


@pytest.mark.parametrize(
    ("lockstep", "fields"),
    [(False, {"tokens": ()}), (True, {}), (True, {"tokens": (), "finish": {"type": "stop"}})],
)
def test_what_can_t_be_postponed_ends_one_request(
    bench: Bench, caplog: pytest.LogCaptureFixture, lockstep: bool, fields: dict[str, Any]
) -> None:
    bench.stage.replaced["admit"] = lambda: Needs(new_tokens=3, lockstep=lockstep)
    bench.stage.replaced["collect"] = wrong(postponed=True, **fields)
    fails_alone(bench, caplog, "postponed")


def test_stages_are_closed_when_the_loop_ends(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    bench.stage.close = raises(SystemExit())  # type: ignore[method-assign]
    bench.inbox.append(Stop())
    bench.loop.run()
    assert f"{NAMED}close of task 'shout' raised SystemExit" in caplog.text


def twice(request: Request, token: int) -> list[Any]:
    return [Step(request, (token,), finish={"type": "stop"})] * 2


def for_a_stranger(request: Request, token: int) -> list[Any]:
    stranger = Request(key=request.key, rid="stranger", task="shout", params=request.params, tokens=[1], prompt_len=1)
    return [Step(stranger, (token,))]


def breaks_off(request: Request, token: int) -> Iterator[Any]:
    yield Step(request, error=RequestError("no"), tokens=("x",))
    raise SystemExit


def endless(request: Request, token: int) -> Iterator[Any]:
    while True:
        yield Step(request)


@pytest.mark.parametrize("values", [[], ["text"], [None, 5], [(1, 2)], 7, None], ids=repr)
def test_what_is_no_step_ends_the_request_that_got_none(
    bench: Bench, caplog: pytest.LogCaptureFixture, values: Any
) -> None:
    bench.stage.replaced["collect"] = lambda request, token: values if values is not None else iter([None])
    fails_alone(bench, caplog, NAMED)


@pytest.mark.parametrize("steps", [for_a_stranger, breaks_off, endless])
def test_steps_for_others_and_without_end(
    bench: Bench, caplog: pytest.LogCaptureFixture, steps: Callable[..., Any]
) -> None:
    bench.stage.replaced["collect"] = steps
    fails_alone(bench, caplog, f"{NAMED}collect of task 'shout' ")


def test_a_collect_that_returns_nothing(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    bench.stage.collect = lambda part, tensors: None  # type: ignore[assignment, return-value, method-assign]
    key = bench.submit(1)
    bench.run()
    assert bench.outcome(key)[1] == 500
    assert f"{NAMED}collect of task 'shout' raised TypeError" in caplog.text


def test_a_second_last_step_is_dropped(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    bench.stage.replaced["collect"] = twice
    key = bench.submit(1, bad=True)
    bench.run()
    assert bench.outcome(key) == ([2], {"type": "stop"})
    assert f"{NAMED}collect of task 'shout' gave a step for request 'r1', which had ended" in caplog.text


def test_a_token_before_the_whole_prompt_is_computed_ends_the_request(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    bench.stage.replaced["admit"] = lambda: Needs(3, rows_from=0)
    bench.stage.replaced["launch"] = lambda: Launched(ONE)
    bench.stage.replaced["collect"] = wrong()
    key = bench.submit(1, bad=True, length=20)
    bench.run()
    assert bench.outcome(key) == ([], 500)
    assert "before the whole prompt" in caplog.text
    bench.check_clean()


def test_no_step_is_collected_twice_because_a_neighbour_was_wrong(bench: Bench) -> None:
    """State has moved in the stage: a second collect would move it again."""
    seen: list[tuple[str, int]] = []
    collect = bench.stage.collect

    def counted(part: Part, tensors: Mapping[str, torch.Tensor]) -> list[Step]:
        seen.extend((row.request.rid, row.end) for row in part.rows)
        return list(collect(part, tensors))

    bench.stage.collect = counted  # type: ignore[method-assign]
    bench.stage.replaced["collect"] = wrong(finish="stop")
    for number in (10, 20, 30):
        bench.submit(number, bad=number == 20)
    bench.run()
    assert len(seen) == len(set(seen)) == 7


@pytest.mark.parametrize(
    "probe",
    [5, ([], Params()), ([0], 5), (["0"], Params()), ([VOCABULARY], Params()), ([0],), (None, Params())],
    ids=repr,
)
def test_a_wrong_probe_fails_the_probe(bench: Bench, caplog: pytest.LogCaptureFixture, probe: Any) -> None:
    bench.stage.replaced["probe"] = lambda: probe
    assert bench.call("probe").error[0] == 500  # type: ignore[index]
    assert f"{NAMED}probe of task 'shout' r" in caplog.text
    bench.check_clean()


@pytest.mark.parametrize("error", [SystemExit(), KeyboardInterrupt(), ValueError("odd"), RequestError("odd")], ids=repr)
def test_a_probe_that_raises_fails_the_probe(bench: Bench, error: BaseException) -> None:
    bench.stage.replaced["probe"] = raises(error)
    assert bench.call("probe").error[0] == 500  # type: ignore[index]


@pytest.mark.parametrize(
    "requests", [5, [], [5], [([0], Params()), ([], Params())], [([0], 5)], [([VOCABULARY], Params())]], ids=repr
)
def test_wrong_requests_for_the_warm_up_name_the_plugin(bench: Bench, requests: Any) -> None:
    bench.stage.warm_up = lambda: requests  # type: ignore[method-assign]
    with pytest.raises(PluginError, match="warm_up of task 'shout'"):
        bench.checked.warm_up_batches()


def test_requests_for_the_warm_up(bench: Bench) -> None:
    """By default the probe, alone and then twice in a batch."""
    [[own], both] = bench.checked.warm_up_batches()
    assert (own.key, own.tokens, own.params, own.cacheable) == (-1, [0], Params(steps=1), False)
    assert [(own.key, own.tokens) for own in both] == [(-1, [0]), (-2, [0])]
    bench.stage.warm_up = lambda: [([0], Params()), ([1, 2], Params(steps=4))]  # type: ignore[method-assign]
    [[own], both] = bench.checked.warm_up_batches()
    assert own.tokens == [0]
    assert [(own.key, own.tokens) for own in both] == [(-1, [0]), (-2, [1, 2])]


def test_params_that_can_not_be_made_end_one_request(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    class Exits(Params):
        def __post_init__(self) -> None:
            raise SystemExit

    bench.stage.params = Exits  # type: ignore[misc]
    bench.checked = CheckedStage(Provided(PLUGIN, bench.stage), VOCABULARY)
    bench.loop.lanes[0].stages = {"shout": bench.checked}
    key = bench.submit(1)
    bench.run()
    assert bench.outcome(key)[1] == 500
    assert f"{NAMED}params of task 'shout' raised SystemExit" in caplog.text


@pytest.mark.parametrize(
    "control",
    [
        *map(raises, [SystemExit(), KeyboardInterrupt(), ValueError("odd"), RequestError("odd", status="x")]),
        lambda model: model,
        lambda model: LOOP,
        lambda model: "\ud800",
        lambda model: np.float32(1),
        lambda model: b"x" * 99,
        lambda: 5,
    ],
)
def test_a_control_that_breaks_its_contract_fails_its_call(
    bench: Bench, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, control: Callable[..., Any]
) -> None:
    monkeypatch.setattr("trunkline.core.engine.checks.MAX_RESULT", 90)
    bench.loop._plugin_controls["count"] = CheckedControl("count", Provided(PLUGIN, control))
    assert bench.call("count").error[0] == 500  # type: ignore[index]
    assert f"{NAMED}the control 'count' r" in caplog.text
    assert bench.call("probe").value == {"type": "length"}


def test_a_control_s_request_error_is_the_caller_s(bench: Bench) -> None:
    bench.loop._plugin_controls["count"] = CheckedControl(
        "count", Provided(PLUGIN, raises(RequestError("busy", status=409)))
    )
    assert bench.call("count").error == (409, "busy", None)


# -- a task that keeps failing ---------------------------------------------------------------


def test_a_task_that_fails_five_times_in_a_row_is_switched_off_until_it_is_enabled(bench: Bench) -> None:
    bench.stage.replaced["launch"] = raises(ValueError("odd"))
    for _ in range(MAX_FAILURES):
        bad = bench.submit(1, bad=True)
        bench.run()
        assert bench.outcome(bad)[1] == 500
    key = bench.submit(1)
    bench.run()
    status, message, _ = bench.sent[-1].error
    assert bench.sent[-1].key == key
    assert status == 503
    assert "'shouting' (shouting-dist 1.5) failed 5 times in a row" in message
    assert "POST /plugins/shouting/enable" in message
    assert bench.call("enable_plugin", plugin="whisper").error[0] == 404  # type: ignore[index]
    assert bench.call("enable_plugin", plugin="shouting").value == ["shout"]
    key = bench.submit(1)
    bench.run()
    assert bench.outcome(key) == ([2, 3, 4], {"type": "length"})
    bench.check_clean()


def test_a_task_that_also_succeeds_stays_on(bench: Bench) -> None:
    bench.stage.replaced["admit"] = raises(ValueError("odd"))
    for _ in range(MAX_FAILURES - 1):
        bench.submit(1, bad=True)
    bench.submit(1)
    bench.run()
    for _ in range(MAX_FAILURES - 1):
        bench.submit(1, bad=True)
    last = bench.submit(1)
    bench.run()
    assert bench.outcome(last) == ([2, 3, 4], {"type": "length"})


def test_what_clients_do_wrong_switches_nothing_off(bench: Bench) -> None:
    bench.stage.replaced["admit"] = raises(RequestError("too loud"))
    for _ in range(3 * MAX_FAILURES):
        bench.submit(1, bad=True)
        bench.submit(1, steps=10_000)
    last = bench.submit(1)
    bench.run()
    assert bench.outcome(last) == ([2, 3, 4], {"type": "length"})


def test_what_the_model_does_wrong_switches_nothing_off(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Echo, "forward", raises(IndexError("device")))
        for _ in range(MAX_FAILURES):
            bench.submit(1)
        bench.run()
    last = bench.submit(1)
    bench.run()
    assert bench.outcome(last) == ([2, 3, 4], {"type": "length"})


@pytest.mark.parametrize("method", ["admit", "collect"])
def test_a_slow_method_is_warned_about_once(
    bench: Bench, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    times = iter(range(10000))
    monkeypatch.setattr(
        "trunkline.core.engine.contracts.time.perf_counter", lambda: next(times) if bench.stage.held else 0.0
    )
    for number in range(3):
        bench.submit(number + 1)
    with caplog.at_level(logging.WARNING):
        bench.run()
    assert caplog.text.count(f"{NAMED}{method} of task 'shout' took 1.00 s") == 1


def test_channels_send_what_would_be_too_long_for_one_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    from trunkline.core.engine import messages

    monkeypatch.setattr(messages, "MAX_FRAME", 100)
    sent = [Answer(number, "x" * 40) for number in range(7)]
    bodies = [frame[4:] for frame in messages.frames(sent)]
    assert len(bodies) > 1
    assert all(len(body) <= 100 for body in bodies)
    assert [one for body in bodies for one in messages.engine_decoder.decode(body)] == sent


def test_local_callers_get_what_the_control_returned() -> None:
    assert CheckedControl("c", Provided(PLUGIN, lambda model: {"a": (1, 2)}))(None) == {"a": (1, 2)}
