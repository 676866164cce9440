"""How a sequence follows its grammar: at once, later in a mask thread, or anew after a limit."""

from __future__ import annotations

import itertools
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest

from trunkline.core.errors import RequestError
from trunkline.plugins.generation.grammar import state as state_module
from trunkline.plugins.generation.grammar.kept import KeptGrammar
from trunkline.plugins.generation.grammar.state import MAX_EXCESS, TOKEN_SECONDS, GrammarState, MaskTime
from trunkline.plugins.generation.hooks import SharedLimit
from trunkline.plugins.generation.schemas import Grammar

FIRST = np.array([7], np.int32)


class Matcher:
    """Each mask is the number of tokens so far. ``errors``: what ``accept`` raises for a token."""

    def __init__(self, length: int, errors: dict[int, BaseException]) -> None:
        self.length, self.errors = length, errors
        self.tokens: list[int] = []

    def fill(self, mask: np.ndarray) -> None:
        mask[:] = len(self.tokens)

    def accept(self, token: int) -> None:
        if token in self.errors:
            raise self.errors[token]
        self.tokens.append(token)

    @property
    def finished(self) -> bool:
        return len(self.tokens) == self.length


class Compiled:
    nbytes = 1

    def __init__(self, length: int = 5, errors: dict[int, BaseException] | None = None) -> None:
        self.length, self.errors = length, errors or {}
        self.matchers: list[Matcher] = []

    def matcher(self) -> Matcher:
        self.matchers.append(Matcher(self.length, self.errors))
        return self.matchers[-1]


def done(outcome: Compiled | RequestError) -> Future[KeptGrammar]:
    future: Future[KeptGrammar] = Future()
    if isinstance(outcome, RequestError):
        future.set_exception(outcome)
    else:
        future.set_result(KeptGrammar(outcome, FIRST))
    return future


def state_of(*outcomes: Compiled | RequestError | Future[KeptGrammar], **options: Any) -> GrammarState:
    """``outcomes``: of the compilation, and of the later ones."""
    futures = iter([each if isinstance(each, Future) else done(each) for each in outcomes])
    options.setdefault("spent", MaskTime())
    return GrammarState(Grammar("regex", "a"), next(futures), lambda used: next(futures), **options)


def advance(state: GrammarState) -> None:
    assert state.idle
    state.begin()
    assert not state.idle
    state.advance()


def test_ordinary_tokens_are_accepted_at_once() -> None:
    compiled = Compiled(length=2)
    state = state_of(compiled)
    assert state.ready
    assert state.mask is FIRST
    state.accept(5)
    assert compiled.matchers[0].tokens == [5]
    assert not state.ready
    assert not state.finished
    advance(state)
    assert state.ready
    assert state.mask.tolist() == [1]
    state.accept(6)
    assert state.finished


@pytest.mark.parametrize("why", ["slow", "busy"])
def test_what_may_take_long_is_left_to_a_mask_thread(why: str) -> None:
    """Its own masks were slow; or another sequence of the grammar is at work, with a lock that they share."""
    compiled = Compiled(length=2)
    kept = done(compiled)
    state = state_of(kept)
    for token in (5, 6):
        if why == "slow":
            state.spent.slow = True
        else:
            kept.result().enter()
        state.accept(token)
        assert len(compiled.matchers[0].tokens) == token - 5
        assert not state.finished
        if why == "busy":
            kept.result().leave()
        advance(state)
        assert compiled.matchers[0].tokens == [5, 6][: token - 4]
    assert state.ready
    assert state.over
    assert kept.result().busy == 0


def test_a_sequence_goes_on_when_its_grammar_was_compiled() -> None:
    """After a weight update: the tokens so far are given to the new matcher."""
    future: Future[KeptGrammar] = Future()
    state = state_of(future, output=[5, 6])
    assert not state.ready
    assert not state.idle
    compiled = Compiled()
    future.set_result(KeptGrammar(compiled, FIRST))
    advance(state)
    assert compiled.matchers[0].tokens == [5, 6]
    assert state.ready


def test_a_refused_grammar_ends_its_sequence() -> None:
    future: Future[KeptGrammar] = Future()
    state = state_of(future, output=[5])
    future.set_exception(RequestError("no"))
    advance(state)
    assert state.ready
    assert state.failure is not None
    assert state.failure.message == "no"


def test_what_a_sequence_waits_for_after_a_shared_limit_is_the_new_grammar() -> None:
    """And it is given to no other mask thread before."""
    fresh: Future[KeptGrammar] = Future()
    state = state_of(Compiled(errors={5: SharedLimit("states")}), fresh)
    state.spent.slow = True
    state.accept(5)
    state.begin()
    in_thread = state.job
    state.advance()
    assert in_thread.done()
    assert state.job is fresh
    assert not state.idle
    fresh.set_result(KeptGrammar(Compiled(), FIRST))
    advance(state)
    assert state.ready


@pytest.mark.parametrize("late", [False, True])
def test_a_shared_limit_is_met_with_a_new_grammar_once(late: bool) -> None:
    used_up = Compiled(errors={7: SharedLimit("states")})
    fresh = Compiled(errors={8: SharedLimit("more states")})
    state = state_of(used_up, fresh)
    for token in (5, 6, 7, 8):
        state.spent.slow = late
        state.accept(token)
        while state.idle and state.failure is None:
            advance(state)
        if token == 7:
            assert state.ready
            assert fresh.matchers[0].tokens == [5, 6, 7]
    assert state.failure is not None
    assert state.failure.message == "The regex grammar can't be followed any further: more states"
    assert len(fresh.matchers) == 1


def test_the_sequences_of_a_request_have_one_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call takes 0.1 s here."""
    clock = itertools.count()
    monkeypatch.setattr(state_module.time, "thread_time", lambda: next(clock) * 0.1)
    spent = MaskTime()
    states = [state_of(Compiled(), spent=spent) for _ in range(4)]
    assert spent.excess == pytest.approx(4 * (0.1 - TOKEN_SECONDS))
    assert not any(state.failure for state in states)
    states[0].accept(5)
    advance(states[0])
    assert spent.slow
    assert spent.excess > MAX_EXCESS
    states[1].accept(5)
    advance(states[1])
    assert states[1].failure is not None
    assert "it takes too much time for each token" in states[1].failure.message


def test_a_dropped_sequence_costs_nothing() -> None:
    compiled = Compiled()
    kept = done(compiled)
    state = state_of(kept)
    state.spent.slow = True
    state.accept(5)
    state.begin()
    state.dropped = True
    state.advance()
    assert compiled.matchers[0].tokens == []
    assert kept.result().busy == 0
