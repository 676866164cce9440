"""Compilation in threads: what is kept, shared, refused and cancelled; which engine is chosen."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from trunkline.core.discovery import Plugin, Provided
from trunkline.core.errors import ConfigError, PluginError, RequestError
from trunkline.plugins.generation.grammar.compiler import FAILED_MESSAGE, GrammarCache, Refusal, choose_engine
from trunkline.plugins.generation.grammar.state import GrammarState
from trunkline.plugins.generation.schemas import Grammar

PLUGIN = Plugin("mine", "mine", distribution="mine-dist", version="3.1")


class Compiled:
    def __init__(self, nbytes: int = 1) -> None:
        self.nbytes = nbytes

    def matcher(self) -> Any:
        return None


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
        return Compiled()


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = Engine()
    yield engine
    engine.gate.set()


def compiler_of(*engines: Any, backend: str = "auto") -> Any:
    return choose_engine([Provided(PLUGIN, each) for each in engines], backend)


def test_what_a_matcher_gave_up_is_compiled_anew(engine: Engine) -> None:
    """Matchers of one compiled grammar may share what has come to its limit."""

    class Exhausted:
        finished = False

        def accept(self, token: int) -> None:
            raise ValueError("too many states")

    compiler = compiler_of(engine)
    engine.gate.set()
    grammar = Grammar("regex", "a")
    compiled = compiler.start(grammar).result(20)
    compiled.matcher = Exhausted
    state = GrammarState(grammar, compiled, lambda: compiler.forget(grammar))
    assert compiler.start(grammar).result(20) is compiled
    state.accept(5)
    assert state.failure is not None
    assert compiler.start(grammar).result(20) is not compiled
    assert engine.compiled == ["a", "a"]
    compiler.forget(Grammar("regex", "unknown"))


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


def test_a_defect_of_an_engine_is_a_500_and_logged_and_tried_again(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    engine.gate.set()
    compiler = compiler_of(engine)
    for _ in range(2):
        error = compiler.start(Grammar("regex", "broken")).exception(20)
        assert isinstance(error, RequestError)
        assert (error.status, error.message) == (500, FAILED_MESSAGE)
    assert engine.compiled == ["broken", "broken"]
    assert "mine-dist 3.1" in caplog.text
    assert "Engine.compile raised SystemExit" in caplog.text
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


def test_the_cache_is_bounded_in_number_and_bytes() -> None:
    cache = GrammarCache(max_entries=3, max_bytes=1000)
    for text in "abc":
        cache.put(Grammar("regex", text), Compiled(100))
    assert cache.get(Grammar("regex", "a"))
    cache.put(Grammar("regex", "d"), Refusal("no"))
    assert cache.get(Grammar("regex", "b")) is None
    assert cache.get(Grammar("regex", "a"))
    assert cache.nbytes == 2 * 104 + 6
    cache.put(Grammar("regex", "e"), Compiled(900))
    assert len(cache) == 1
    cache.put(Grammar("regex", "f"), Compiled(5000))  # kept until the next one: others may ask for it at once
    assert len(cache) == 1
    cache.put(Grammar("regex", "g"), Compiled(1))
    assert cache.nbytes == 5


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
