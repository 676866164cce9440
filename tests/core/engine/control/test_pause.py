"""Pauses in every mode, with and without a weight update: nobody computes, nobody is lost, labels tell the truth."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from trunkline.core import Engine
from trunkline.core.client.engine import Ticket
from trunkline.core.engine.lane import Lane
from trunkline.core.engine.loop import EngineLoop
from trunkline.core.engine.scheduling.scheduler import Scheduler
from trunkline.core.errors import EngineDown, RequestError
from trunkline.core.types import Needs, Request
from trunkline.plugins.embedding.offline import encode
from trunkline.plugins.embedding.schemas import EmbeddingParams
from trunkline.plugins.generation.schemas import GenerationParams, GenerationResult, LogprobParams
from trunkline.plugins.generation.stage import GenerationStage

PROMPT = list(range(5, 60))
MODES = ["retract", "in_place"]


def start(*folders: Path, **options: Any) -> Engine:
    return Engine(*map(str, folders), dtype="float32", threads=1, **options)


def submit(engine: Engine, new: int = 12, prompt: list[int] | None = None, stop: str = "", **options: Any) -> Ticket:
    stops = (stop,) if stop else ()
    params = GenerationParams(max_new_tokens=new, temperature=0, ignore_eos=True, stop=stops)
    return engine.submit("generation", prompt or PROMPT, params, **options)


def begin(engine: Engine, control: str, **arguments: Any) -> Future[Any]:
    async def call() -> Any:
        return await engine.client.call(control, **arguments)

    return engine.start(call())


def lane(engine: Engine) -> Lane:
    (only,) = engine.client.transport.loop.lanes
    assert isinstance(only, Lane)
    return only


def pause_in_mid_reply(engine: Engine, mode: str, new: int = 300, **options: Any) -> tuple[Ticket, int]:
    """A reply that is paused after some tokens, and how many."""
    ticket = submit(engine, new, **options)
    for _, _ in zip(range(5), ticket, strict=False):
        pass
    engine.call("pause", mode=mode)
    settled = len(ticket.reply.tokens)
    time.sleep(0.1)
    assert len(ticket.reply.tokens) == settled, "a paused model went on"
    assert not ticket.done
    return ticket, settled


@pytest.fixture
def old(zoo: Callable[[str], Path]) -> Path:
    return zoo("llama")


@pytest.fixture
def new(other: Callable[[str], Path]) -> Path:
    return other("llama")


@pytest.fixture
def engine(old: Path) -> Iterator[Engine]:
    with start(old) as engine:
        yield engine


@pytest.fixture(scope="module")
def continued() -> Callable[..., list[int]]:
    """``continued([(folder, count), …], in_place=…)``: greedy tokens, ``count`` of them by each checkpoint in turn.

    In place, transformers' own cache goes from one model to the next as it is; else each model reads all
    anew. With ``given`` each token is the one after the prompt and the given tokens before it: so a reply
    that equals the outcome is the greedy one, and each checkpoint is asked but once.
    """
    models: dict[Path, Any] = {}

    @torch.inference_mode()
    def greedy(
        spans: list[tuple[Path, int]], *, in_place: bool, prompt: list[int] = PROMPT, given: list[int] | None = None
    ) -> list[int]:
        tokens, cache, known = list(prompt), None, 0
        chosen: list[int] = []
        for folder, count in spans:
            if folder not in models:
                models[folder] = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
            if not in_place:
                cache, known = None, 0
            for step in [count] if given is not None else [1] * count:
                if given is not None:
                    tokens = [*prompt, *given[: len(chosen) + step - 1]]
                output = models[folder](torch.tensor([tokens[known:]]), past_key_values=cache, use_cache=True)
                cache, known = output.past_key_values, len(tokens)
                chosen += output.logits[0, -step:].argmax(-1).tolist()
                tokens.append(chosen[-1])
        return chosen

    return greedy


# -- without an update -----------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_a_paused_request_goes_on_as_if_nothing_had_been(engine: Engine, mode: str) -> None:
    alone = submit(engine, 300).result(60).tokens
    ticket, _ = pause_in_mid_reply(engine, mode)
    scheduler = lane(engine).scheduler
    assert (scheduler.running, scheduler.waiting) == ((1, 0) if mode == "in_place" else (0, 1))
    state = engine.client.status.model_state(lane(engine).served)
    assert (state["num_running_reqs"], state["num_waiting_reqs"]) == (scheduler.running, scheduler.waiting)
    later = submit(engine)
    assert engine.call("flush_cache") == (mode == "retract")  # in place its slots are in use
    time.sleep(0.1)
    assert not later.done
    engine.call("continue")
    assert ticket.result(60).tokens == alone
    assert later.result(60).tokens == alone[:12]
    assert ticket.reply.versions == []
    assert scheduler.free_slots() == lane(engine).served.max_total_tokens


def test_a_pause_that_aborts_ends_what_is_there_and_keeps_what_comes(engine: Engine) -> None:
    running, waiting = submit(engine, 400), submit(engine, 400)
    next(iter(running))
    engine.call("pause")
    assert (running.result(60).finish or {})["message"] == "Aborted"
    assert (waiting.result(60).finish or {})["type"] == "abort"
    assert running.reply.tokens
    later = submit(engine)
    time.sleep(0.1)
    assert not later.done
    assert later.reply.started == 0  # so --queue-timeout counts
    later.cancel()
    assert (later.result(60).finish or {})["message"] == "Abort in waiting queue"
    engine.call("continue")
    engine.call("continue")  # harmless
    assert submit(engine).result(60).tokens


def test_a_second_pause_does_what_its_mode_does(engine: Engine) -> None:
    alone = submit(engine, 300).result(60).tokens
    ticket, _ = pause_in_mid_reply(engine, "in_place")
    scheduler = lane(engine).scheduler
    assert scheduler.running == 1
    engine.call("pause", mode="retract")
    assert scheduler.running == 0
    engine.call("pause", mode="in_place")
    engine.call("continue")
    assert ticket.result(60).tokens == alone
    ticket, _ = pause_in_mid_reply(engine, "retract")
    engine.call("pause", mode="abort")
    assert (ticket.result(60).finish or {})["type"] == "abort"


def test_an_unknown_mode_pauses_nothing(engine: Engine) -> None:
    with pytest.raises(RequestError, match="mode"):
        engine.call("pause", mode="gently")
    assert submit(engine).result(60).tokens


@pytest.mark.parametrize("mode", ["abort", *MODES])
def test_a_paused_engine_is_healthy_and_sleeps(engine: Engine, mode: str) -> None:
    ticket = submit(engine, 400)
    probe = begin(engine, "probe")
    engine.call("pause", mode=mode)
    assert probe.result(20)  # one that was on its way ends, too
    assert engine.call("probe") == {"type": "halted"}
    loop = engine.client.transport.loop
    turns = []
    receive = loop.receive
    loop.receive = lambda: (turns.append(1), receive())
    time.sleep(0.3)
    assert len(turns) <= 1, "the loop spins"
    assert loop.heartbeat().age == 0
    loop.receive = receive
    engine.call("continue")
    ticket.cancel()


def test_pausing_one_model_leaves_the_other_alone(zoo: Callable[[str], Path], old: Path) -> None:
    second = zoo("qwen2")
    with start(old, second) as engine:
        engine.call("pause", mode="in_place")
        held, free = submit(engine), submit(engine, model=str(second))
        assert free.result(60).tokens
        assert not held.done
        engine.call("pause", mode="abort", model=str(second))
        assert not held.done
        engine.call("continue")
        assert held.result(60).tokens
        assert engine.run(drop(engine, str(second))) == 0


async def drop(engine: Engine, model: str) -> int:
    return engine.client.abort(everything=True, model=model)


def test_aborting_by_model(zoo: Callable[[str], Path], old: Path) -> None:
    second = zoo("qwen2")
    with start(old, second) as engine:
        mine, other = submit(engine, 400), submit(engine, 400, model=str(second))
        assert engine.run(drop(engine, str(second))) == 1
        assert (other.result(60).finish or {})["type"] == "abort"
        assert (mine.result(60).finish or {})["type"] == "length"


# -- with an update --------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_an_update_in_a_pause(
    engine: Engine, old: Path, new: Path, mode: str, continued: Callable[..., list[int]]
) -> None:
    ticket, count = pause_in_mid_reply(engine, mode, 60)
    waiting = submit(engine)
    answer = engine.call("update_weights", model_path=str(new), weight_version="two")
    assert answer["success"]
    assert answer["num_paused_requests"] == 2
    assert not ticket.done
    radix = lane(engine).scheduler._ledger._radix
    kept = sum(len(node.tokens) for node in radix._nodes())
    engine.call("continue")
    ticket.result(60)
    assert ticket.reply.tokens == continued([(old, count), (new, 60 - count)], in_place=mode == "in_place")
    assert (ticket.reply.versions, ticket.reply.weight_version) == ([("default", count)], "two")
    fresh = continued([(new, 12)], in_place=False)
    assert waiting.result(60).tokens == fresh
    assert (waiting.reply.versions, waiting.reply.weight_version) == ([], "two")
    again = submit(engine).result(60)
    assert again.tokens == fresh
    assert again.cached_tokens == len(PROMPT) - 1  # what the waiting one computed
    assert mode == "in_place" or kept == 0
    scheduler = lane(engine).scheduler
    assert scheduler.free_slots() == lane(engine).served.max_total_tokens
    assert engine.call("flush_cache")


def test_rows_with_old_keys_leave_nothing_in_the_tree(engine: Engine, new: Path) -> None:
    """Whatever takes them away: their end, an abort, or a retraction."""
    for way in ("end", "abort", "retract"):
        ticket, _ = pause_in_mid_reply(engine, "in_place", 60)
        assert engine.call("update_weights", model_path=str(new))["success"]
        if way == "retract":
            engine.call("pause", mode="retract")
            engine.call("continue")
            ticket.result(60)
        else:
            engine.call("continue")
            ticket.cancel() if way == "abort" else ticket.result(60)
            ticket.result(60)
        radix = lane(engine).scheduler._ledger._radix
        space = bytes([0]) + lane(engine).namespace(b"")
        assert space not in radix._root.children, way
        assert engine.call("flush_cache")


def test_an_update_that_waits_for_requests_waits_no_more_once_they_are_paused(
    engine: Engine, old: Path, new: Path, continued: Callable[..., list[int]]
) -> None:
    ticket = submit(engine, 400)
    next(iter(ticket))
    update = begin(engine, "update_weights", model_path=str(new), weight_version="two")
    held = submit(engine)
    while not engine.client.transport.loop.updates.deferred_requests(lane(engine)):
        time.sleep(0.001)
    engine.call("pause", mode="retract")
    assert update.result(60)["success"]
    engine.call("continue")
    count = ticket.result(60).versions[0][1]
    assert ticket.reply.tokens == continued([(old, count), (new, 400 - count)], in_place=False)
    assert held.result(60).tokens == continued([(new, 12)], in_place=False)


@pytest.mark.parametrize("mode", ["abort", *MODES])
def test_a_failed_update_in_a_pause_changes_nothing(engine: Engine, mode: str, tmp_path: Path) -> None:
    alone = submit(engine, 300).result(60).tokens
    ticket, _ = pause_in_mid_reply(engine, mode) if mode != "abort" else (None, 0)
    engine.call("pause", mode=mode)
    assert not engine.call("update_weights", model_path=str(tmp_path))["success"]
    engine.call("continue")
    if ticket is not None:
        assert ticket.result(60).tokens == alone
    assert submit(engine).result(60).cached_tokens == len(PROMPT) - 1


def test_labels_that_come_and_go_between_two_tokens(engine: Engine, new: Path) -> None:
    ticket, count = pause_in_mid_reply(engine, "in_place", 60)
    for label in ("two", "three", "default"):
        engine.call("update_weight_version", new_version=label, abort_all_requests=False)
    assert (ticket.reply.versions, ticket.reply.weight_version) == ([], "default")
    for label in ("two", "three"):
        engine.call("update_weight_version", new_version=label, abort_all_requests=False)
    engine.call("continue")
    ticket.result(60)
    assert (ticket.reply.versions, ticket.reply.weight_version) == ([("default", count)], "three")


def test_a_stop_string_over_the_pause_is_found(engine: Engine, new: Path) -> None:
    """The text that was read before goes on, and the end tokens are those of the new checkpoint."""
    ticket, count = pause_in_mid_reply(engine, "in_place", 60, stop="never said")
    before = lane(engine).stages["generation"].stage
    (request,) = [request for _, request in engine.client.transport.loop.requests.values()]
    text = request.state.text.text
    assert engine.call("update_weights", model_path=str(new))["success"]
    assert lane(engine).stages["generation"].stage is not before
    assert request.state.text.text == text != ""
    engine.call("continue")
    assert len(ticket.result(60).tokens) == 60
    assert count < 60


@pytest.mark.parametrize("mode", MODES)
def test_what_a_reply_has_beside_tokens_goes_on(
    zoo: Callable[[str], Path], other: Callable[[str], Path], mode: str
) -> None:
    """One row of log-probabilities a token, and the experts of every position, whatever the pause does."""
    wanted = LogprobParams(start=10, top=2)
    params = GenerationParams(
        max_new_tokens=60, temperature=0, ignore_eos=True, frequency_penalty=0.5, logprobs=wanted, experts_from=0
    )
    with start(zoo("qwen2-moe")) as engine:
        ticket = engine.submit("generation", PROMPT, params)
        for _, _ in zip(range(5), ticket, strict=False):
            pass
        engine.call("pause", mode=mode)
        assert not ticket.done
        assert engine.call("update_weights", model_path=str(other("qwen2-moe")))["success"]
        engine.call("continue")
        results = [msgspec.convert(one, GenerationResult) for one in ticket.result(60).results]
    assert sum(len(one.output.chosen) // 4 for one in results if one.output) == len(ticket.reply.tokens) == 60
    assert sum(len(one.prompt.chosen) // 4 for one in results if one.prompt) == len(PROMPT) - 1 - wanted.start
    experts = np.frombuffer(results[-1].experts, np.int32)
    assert experts.size
    assert experts.min() >= 0, "positions are missing"


@pytest.mark.parametrize("mode", MODES)
def test_vectors_are_of_one_version(old: Path, new: Path, mode: str) -> None:
    """A long text that is half computed when the weights change is computed again."""
    with start(new, task=("embedding",)) as fresh:
        wanted = encode(fresh, ["the sea is there " * 20])[0]
    with start(old, task=("embedding",), chunked_prefill_size=16) as engine:
        ids = engine.encode("the sea is there " * 20)
        half: list[int] = []
        first = lane(engine)
        finish = first.finish

        def stop_after_a_chunk(flight: Any, following: Any = None, **options: Any) -> Any:
            steps = finish(flight, following, **options)
            half.append(flight.batch.rows[0].end)
            first.paused = True
            return steps

        first.finish = stop_after_a_chunk  # type: ignore[method-assign]
        ticket = engine.submit("embedding", ids, EmbeddingParams())
        while not half:
            time.sleep(0.01)
        del first.finish
        assert 0 < half[0] < len(ids)
        engine.call("pause", mode=mode)
        assert engine.call("update_weights", model_path=str(new), weight_version="two")["success"]
        engine.call("continue")
        vector = torch.frombuffer(bytearray(ticket.result(60).data["vector"]), dtype=torch.float32)
        assert torch.allclose(vector, torch.from_numpy(wanted), atol=1e-5)
        assert (ticket.reply.weight_version, ticket.reply.versions) == ("two", [])


@pytest.mark.parametrize("way", ["refuses", "raises", "wants more"])
def test_a_stage_that_does_not_take_a_request_over_ends_it_alone(
    engine: Engine, new: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    released: list[str] = []
    adopt = GenerationStage.adopt

    def odd(self: GenerationStage, request: Request) -> Needs:
        if request.rid != "odd":
            return adopt(self, request)
        if way == "refuses":
            raise RequestError("not with these weights", status=409)
        if way == "raises":
            raise ZeroDivisionError
        return Needs(new_tokens=request.needs.new_tokens + 1)

    monkeypatch.setattr(GenerationStage, "adopt", odd)
    monkeypatch.setattr(GenerationStage, "release", lambda self, request: released.append(request.rid))
    fine, bad = submit(engine, 60, rid="fine"), submit(engine, 60, rid="odd")
    next(iter(bad))
    engine.call("pause", mode="in_place")
    answer = engine.call("update_weights", model_path=str(new))
    assert answer["success"]
    with pytest.raises(RequestError) as caught:
        bad.result(60)
    assert caught.value.status == (409 if way == "refuses" else 500)
    engine.call("continue")
    assert len(fine.result(60).tokens) == 60
    # The old stage released both; then the new one each that it took over, and one that it took over wrongly.
    assert sorted(released) == ["fine", "fine", "odd"] + ["odd"] * (way == "wants more")
    assert lane(engine).scheduler.free_slots() == lane(engine).served.max_total_tokens


# -- anything in any order -------------------------------------------------------------------


class Storm:
    """Random requests, pauses and updates on a pool that is too small; every reply is compared with transformers."""

    def __init__(self, engine: Engine, folders: dict[str, Path], continued: Callable[..., list[int]], seed: int):
        self.engine, self.folders, self.continued = engine, folders, continued
        self.dice = random.Random(seed)
        self.live: list[tuple[Ticket, list[int], int]] = []
        self.mixed = 0

    def run(self, rounds: int, mode: str) -> None:
        for _ in range(rounds):
            for _ in range(self.dice.randint(1, 3)):
                prompt = PROMPT[: self.dice.randint(1, 55)]
                new = self.dice.randint(1, 60)
                self.live.append((submit(self.engine, new, prompt), prompt, new))
            for _ in zip(range(self.dice.randint(0, 12)), self.live[-1][0], strict=False):
                pass  # until the latest has so many tokens
            self.engine.call("pause", mode=mode)
            if mode == "abort":
                # Whoever is ended was told before the call was answered.
                assert all(ticket.done for ticket, *_ in self.live), "a pause that aborts has left somebody running"
            if self.dice.random() < 0.3:
                self.live.pop(self.dice.randrange(len(self.live)))[0].cancel()
            label = self.dice.choice(list(self.folders))
            if self.dice.random() < 0.7:
                path = str(self.folders[label])
                assert self.engine.call("update_weights", model_path=path, weight_version=label)["success"]
            self.engine.call("continue")
        for ticket, prompt, new in self.live:
            ticket.result(60)
            self.check(ticket, prompt, new, mode)
        scheduler = lane(self.engine).scheduler
        assert scheduler.free_slots() == lane(self.engine).served.max_total_tokens
        assert self.engine.call("flush_cache")

    def check(self, ticket: Ticket, prompt: list[int], new: int, mode: str) -> None:
        count = len(ticket.reply.tokens) if mode == "abort" else new
        assert mode != "abort" or (ticket.reply.finish or {})["type"] in ("abort", "length")
        if not ticket.reply.weight_version:  # it was aborted before it began
            assert ticket.reply.tokens == []
            return
        ends = [*ticket.reply.versions, (ticket.reply.weight_version, count)]
        starts = [0, *(end for _, end in ticket.reply.versions)]
        spans = [(self.folders[label], end - start) for (label, end), start in zip(ends, starts, strict=True)]
        self.mixed += len(spans) > 1
        given = ticket.reply.tokens
        assert given == self.continued(spans, in_place=mode == "in_place", prompt=prompt, given=given)


def storm(old: Path, new: Path, continued: Callable[..., list[int]], mode: str, seed: int = 5) -> int:
    # In place no retraction may come between, which would compute old tokens with new weights: a pool for all.
    tokens = 240 if mode == "retract" else 4096
    with start(old, max_total_tokens=tokens, chunked_prefill_size=16, max_running_requests=3) as engine:
        one = Storm(engine, {"default": old, "new": new}, continued, seed)
        one.run(25, mode)
        return one.mixed


def storms(old: Path, new: Path, continued: Callable[..., list[int]], mode: str) -> None:
    """Several storms: what each of them meets depends on how fast the engine is just then."""
    for seed in range(5, 13):
        storm(old, new, continued, mode, seed)


@pytest.mark.parametrize("mode", ["abort", *MODES])
def test_a_storm_of_pauses_and_updates(old: Path, new: Path, continued: Callable[..., list[int]], mode: str) -> None:
    assert (storm(old, new, continued, mode) > 5) == (mode != "abort")


def keep_the_namespace(self: Lane, request: Request, former: Any, original: Any) -> Any:
    before = request.namespace
    try:
        return original(self, request, former)
    finally:
        request.namespace = before


def keep_the_cache(self: Scheduler, boundaries: Any, original: Any) -> Any:
    running = [entry.request for entry in self._running]
    requests = original(self, boundaries)
    for request in running:
        request.cacheable = True
    return requests


def end_the_first_alone(self: EngineLoop, owner: Lane, original: Any, **options: Any) -> None:
    kept = dict(list(self.requests.items())[1:])
    for key in kept:
        del self.requests[key]
    original(self, owner, **options)
    self.requests.update(kept)


def keep_the_keys(self: Lane, *arguments: Any, original: Any) -> Any:
    return []


@pytest.mark.parametrize(
    ("mode", "owner", "name", "defect"),
    [
        ("abort", EngineLoop, "abort_all", end_the_first_alone),
        ("in_place", Scheduler, "start_epoch", keep_the_cache),
        ("in_place", Lane, "_adopt", keep_the_namespace),
        ("retract", Lane, "retract", keep_the_keys),
    ],
)
def test_the_storm_catches(
    old: Path,
    new: Path,
    continued: Callable[..., list[int]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    mode: str,
    owner: type,
    name: str,
    defect: Callable[..., Any],
) -> None:
    original = getattr(owner, name)
    broken: Any = lambda self, *given, **named: defect(self, *given, original=original, **named)  # noqa: E731
    monkeypatch.setattr(owner, name, broken)
    with pytest.raises((AssertionError, EngineDown)):
        storms(old, new, continued, mode)
    assert "TypeError" not in caplog.text  # it is the defect that is caught
