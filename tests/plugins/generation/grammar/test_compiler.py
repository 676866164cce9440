"""Compilation in threads: what is kept, shared, refused and cancelled; which engine is chosen."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from trunkline.core.discovery import Plugin, Provided
from trunkline.core.errors import ConfigError, PluginError, RequestError
from trunkline.plugins.generation.grammar import compiler as compiler_module
from trunkline.plugins.generation.grammar.compiler import FAILED_MESSAGE, MAX_SLOW_WAITING, MAX_WAITING, STOPPING
from trunkline.plugins.generation.grammar.engines import choose_engine
from trunkline.plugins.generation.schemas import Grammar

PLUGIN = Plugin("mine", "mine", distribution="mine-dist", version="3.1")


class Matcher:
    finished = False

    def fill(self, mask: np.ndarray) -> None:
        mask[:] = -1

    def accept(self, token: int) -> None: ...


class Compiled:
    def __init__(self, nbytes: int = 1) -> None:
        self.nbytes = nbytes

    def matcher(self) -> Matcher:
        return Matcher()


class Unprintable(ValueError):
    def __str__(self) -> str:
        raise KeyError


class Engine:
    """Compiles when the gate is open."""

    def __init__(self, name: str = "mine") -> None:
        self.name = name
        self.gate = threading.Event()
        self.began = threading.Semaphore(0)
        self.compiled: list[str] = []

    def compile(self, grammar: Grammar) -> Compiled:
        self.began.release()
        assert self.gate.wait(20)
        self.compiled.append(grammar.text)
        if grammar.text == "refused":
            raise ValueError("not this one")
        if grammar.text == "broken":
            raise SystemExit(3)
        if grammar.text == "unprintable":
            raise Unprintable
        if grammar.text == "without nbytes":
            return Compiled("many")  # type: ignore[arg-type]
        if grammar.text == "under load":
            raise RequestError("later", status=503)
        return Compiled(int(grammar.text) if grammar.text.isdigit() else 1)


class TwoSpeeds(Engine):
    """Compiles texts that begin with "slow" when the gate is open, others at once; ``cancel`` lets calls fail."""

    def compile_quickly(self, grammar: Grammar) -> Compiled | None:
        return None if grammar.text.startswith("slow") else Compiled()

    def compile(self, grammar: Grammar) -> Compiled:
        compiled = super().compile(grammar)
        if grammar.text == "slow cancelled":
            raise RuntimeError("cancelled")
        return compiled

    def cancel(self) -> None:
        self.gate.set()


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = Engine()
    yield engine
    engine.gate.set()


def compiler_of(*engines: Any, backend: str = "auto") -> Any:
    return choose_engine([Provided(PLUGIN, each) for each in engines], backend, 64)


def reason_of(future: Any) -> tuple[int, str]:
    """The status and the message of a compilation that failed."""
    error = future.exception(20)
    assert isinstance(error, RequestError)
    return error.status, error.message


def test_what_is_used_up_is_compiled_anew_once(engine: Engine) -> None:
    """For all sequences of a grammar, whose matchers have come to a limit that they share."""
    compiler = compiler_of(engine)
    engine.gate.set()
    grammar = Grammar("regex", "a")
    kept = compiler.start(grammar).result(20)
    assert compiler.start(grammar).result(20) is kept
    renewed = [compiler.renew(grammar, kept).result(20) for _ in range(3)]
    assert renewed[0] is not kept
    assert renewed == renewed[:1] * 3
    assert engine.compiled == ["a", "a"]


def test_a_grammar_that_takes_long_delays_no_other() -> None:
    engine = TwoSpeeds()
    compiler = compiler_of(engine)
    slow = [compiler.start(Grammar("regex", "slow 0"))]
    assert engine.began.acquire(timeout=20)  # it is in the third thread
    for index in range(MAX_SLOW_WAITING):
        slow.append(compiler.start(Grammar("regex", f"slow {index + 1}")))
        assert compiler.start(Grammar("regex", f"quick {index}")).result(20)
    while compiler._slow._jobs <= MAX_SLOW_WAITING:
        time.sleep(0.01)  # the last one is on its way to the third thread
    status, message = reason_of(compiler.start(Grammar("regex", "slow, too")))
    assert status == 503
    assert "takes long to compile, and 4 such grammars wait already" in message
    assert not any(future.done() for future in slow)
    engine.gate.set()
    assert all(future.result(20) for future in slow)
    assert compiler.start(Grammar("regex", "slow, too")).result(20)  # a busy server is no property of a grammar


def test_only_so_many_grammars_may_wait(engine: Engine) -> None:
    compiler = compiler_of(engine)
    futures = [compiler.start(Grammar("regex", f"g{index}")) for index in range(MAX_WAITING + 2)]
    assert reason_of(compiler.start(Grammar("regex", "more")))[0] == 503
    equal = compiler.start(Grammar("regex", "g5"))
    engine.gate.set()
    assert equal.result(20)
    assert all(future.result(20) for future in futures)
    assert compiler.start(Grammar("regex", "more")).result(20)


def test_at_the_end_everyone_gets_an_answer_at_once(caplog: pytest.LogCaptureFixture) -> None:
    engine = TwoSpeeds()
    compiler = compiler_of(engine)
    compiler.open()
    compiler.open()  # a weight update: the new stage has the same compiler
    waiting = [compiler.start(Grammar("regex", f"slow {name}")) for name in ("cancelled", "waiting")]
    assert engine.began.acquire(timeout=20)
    compiler.close()
    assert compiler.start(Grammar("regex", "quick")).result(20)
    assert not any(future.done() for future in waiting)
    compiler.close()
    assert [reason_of(future) for future in waiting] == [(503, STOPPING)] * 2
    assert reason_of(compiler.start(Grammar("regex", "late"))) == (503, STOPPING)
    assert compiler.start(Grammar("regex", "quick")).result(20)
    assert not caplog.records
    assert compiler_of(engine) is not compiler


def test_weight_updates_keep_what_is_compiled(engine: Engine) -> None:
    compiler = compiler_of(engine)
    assert compiler_of(engine) is compiler
    assert compiler_of(Engine()) is not compiler


def test_the_memory_of_grammars_in_use_is_bounded(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler_module, "MAX_LIVING", 1000)
    monkeypatch.setattr(compiler_module, "SMALL", 100)
    engine.gate.set()
    compiler = compiler_of(engine)

    def compile_(text: str) -> Any:
        """The Future, which a request keeps as long as it runs."""
        future = compiler.start(Grammar("regex", text))
        assert future.exception(20) is None
        return future

    used = [compile_("450"), compile_("480")]
    compile_("10")
    compile_("11")
    for _ in range(2):
        assert reason_of(compiler.start(Grammar("regex", "400")))[0] == 503
    assert len(compiler._cache) == 4  # to forget the two small ones would not help
    compile_("90")  # a small one
    del used[0]
    compile_("360")
    assert [int(grammar.text) for grammar in compiler._cache._entries] == [
        480,
        10,
        11,
        90,
        360,
    ]  # only what must be is forgotten
    assert compiler._cache.get(Grammar("regex", "480")) is used[0].result()


def test_equal_grammars_are_compiled_once_and_kept(engine: Engine) -> None:
    compiler = compiler_of(engine)
    futures = [compiler.start(Grammar("regex", "a")) for _ in range(5)]
    other = compiler.start(Grammar("ebnf", "a"))
    assert not futures[0].done()
    engine.gate.set()
    assert len({id(future.result(20)) for future in futures}) == 1
    assert other.result(20) is not futures[0].result()
    assert compiler.start(Grammar("regex", "a")).done()
    assert engine.compiled == ["a", "a"]


def test_refusals_are_kept_and_name_the_field(engine: Engine) -> None:
    engine.gate.set()
    compiler = compiler_of(engine)
    for _ in range(2):
        error = compiler.start(Grammar("json_schema", "refused")).exception(20)
        assert isinstance(error, RequestError)
        assert error.message == "Failed to compile json_schema grammar: not this one"
        assert (error.status, error.param) == (400, "json_schema")
    assert engine.compiled == ["refused"]


@pytest.mark.parametrize(
    ("text", "raised"),
    [
        ("broken", "SystemExit: 3"),
        ("unprintable", "KeyError"),
        ("without nbytes", "TypeError: 'str' object cannot be interpreted as an integer"),
    ],
)
def test_a_defect_of_an_engine_is_a_500_and_logged_and_tried_again(
    engine: Engine, text: str, raised: str, caplog: pytest.LogCaptureFixture
) -> None:
    engine.gate.set()
    compiler = compiler_of(engine)
    for _ in range(2):
        error = compiler.start(Grammar("regex", text)).exception(20)
        assert isinstance(error, RequestError)
        assert (error.status, error.message) == (500, FAILED_MESSAGE)
    assert engine.compiled == [text, text]
    assert "mine-dist 3.1" in caplog.text
    assert f"Engine.compile raised {raised}" in caplog.text
    assert compiler.start(Grammar("regex", "good")).result(20)


def test_cancelled_requests_are_not_compiled_and_others_still_are(engine: Engine) -> None:
    compiler = compiler_of(engine)
    running = [compiler.start(Grammar("regex", text)) for text in "ab"]  # both threads are busy
    for _ in running:
        assert engine.began.acquire(timeout=20)
    waiting = [compiler.start(Grammar("regex", text)) for text in "ccdd"]
    for index in (0, 2, 3):
        assert waiting[index].cancel()
    last = compiler.start(Grammar("regex", "e"))
    engine.gate.set()
    assert waiting[1].result(20)
    assert last.result(20)
    assert all(future.result(20) for future in running)
    assert sorted(engine.compiled) == ["a", "b", "c", "e"]
    assert compiler.start(Grammar("regex", "d")).result(20)


def test_a_request_error_of_an_engine_is_not_kept(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    engine.gate.set()
    compiler = compiler_of(engine)
    assert [reason_of(compiler.start(Grammar("regex", "under load"))) for _ in range(2)] == [(503, "later")] * 2
    assert engine.compiled == ["under load", "under load"]
    assert not caplog.records


def test_the_engine_is_chosen_by_name() -> None:
    own, other = Engine("llguidance"), Engine("other")
    assert compiler_of(other, own).engine is own
    assert compiler_of(other).engine is other
    assert compiler_of(own, other, backend="other").engine is other
    assert compiler_of(own, backend="none").engine is None
    assert compiler_of(backend="llguidance").engine is None
    with pytest.raises(ConfigError, match="'xgrammar': there is no such grammar engine; choose one of auto, none, llg"):
        compiler_of(other, backend="xgrammar")


@pytest.mark.parametrize("wrong", [object(), Compiled()])
def test_an_object_that_is_no_engine_is_refused(wrong: Any) -> None:
    with pytest.raises(PluginError, match="needs a name, a string, and a method compile"):
        compiler_of(wrong)


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        ("auto", "regex needs a tokenizer, and this model has none; leave it out."),
        ("none", "regex is switched off on this server (--grammar-backend none); leave it out."),
    ],
)
def test_without_an_engine_requests_are_refused(backend: str, message: str) -> None:
    error = compiler_of(backend=backend).start(Grammar("regex", "a")).exception(20)
    assert isinstance(error, RequestError)
    assert (error.status, error.message, error.param) == (400, message, "regex")
