"""The masks of a pass: those that come in time, and those that don't."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, wait
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from trunkline.plugins.generation.grammar import masks as masks_module
from trunkline.plugins.generation.grammar.kept import KeptGrammar
from trunkline.plugins.generation.grammar.masks import MaskFiller
from trunkline.plugins.generation.grammar.state import TOKEN_SECONDS, GrammarState, MaskTime
from trunkline.plugins.generation.schemas import Grammar

CPU = torch.device("cpu")


class Matcher:
    """Fills masks when the gate is open. It is its own compiled grammar. ``slow``: that takes more than is allowed."""

    nbytes = 1
    finished = False

    def __init__(self, value: int, *, slow: bool = False) -> None:
        self.gate = threading.Event()
        self.value, self.slow = value, slow
        self.threads: list[str] = []

    def matcher(self) -> Matcher:
        return self

    def fill(self, mask: np.ndarray) -> None:
        self.threads.append(threading.current_thread().name)
        assert self.gate.wait(20)
        began = time.thread_time()
        while self.slow and time.thread_time() - began <= TOKEN_SECONDS:
            pass
        mask[:] = self.value

    def accept(self, token: int) -> None: ...


def row_of(matcher: Matcher, spent: MaskTime | None = None) -> Any:
    """A row of a sequence that has one token."""
    kept: Future[KeptGrammar] = Future()
    kept.set_result(KeptGrammar(matcher, np.zeros(1, np.int32)))
    state = GrammarState(Grammar("regex", "a"), kept, lambda used: kept, spent or MaskTime())
    state.accept(5)
    return SimpleNamespace(request=SimpleNamespace(state=SimpleNamespace(grammar=state)))


@pytest.fixture
def filler(monkeypatch: pytest.MonkeyPatch) -> Iterator[MaskFiller]:
    monkeypatch.setattr(masks_module, "THREADS", 1)
    filler = MaskFiller(32)
    yield filler
    filler.close()


def test_a_mask_that_is_late_is_awaited_by_a_later_pass(filler: MaskFiller, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masks_module, "WAIT_SECONDS", 0.0)
    slow, quick = Matcher(3), Matcher(4)
    rows = [row_of(slow), SimpleNamespace(request=SimpleNamespace(state=SimpleNamespace(grammar=None)))]
    first = filler.start(rows)
    assert first is not None
    assert first.rows.tolist() == [0]
    assert first.wait(CPU).tolist() == [[-1]]
    state = rows[0].request.state.grammar
    assert state.late
    quick.gate.set()
    slow.gate.set()
    wait([state.job], 20)
    second = filler.start([*rows, row_of(quick)])
    assert second is not None
    wait(second.jobs, 20)
    assert second.wait(CPU).tolist() == [[3], [4]]
    assert not state.late
    assert len(slow.threads) == 1


def test_slow_masks_have_a_thread_of_their_own(filler: MaskFiller) -> None:
    spent = MaskTime()
    found, sibling, other = Matcher(1, slow=True), Matcher(2), Matcher(3)
    for matcher in (found, sibling, other):
        matcher.gate.set()
    rows = [row_of(found, spent), row_of(sibling, spent), row_of(other)]
    masks = filler.start(rows)
    assert masks is not None
    wait(masks.jobs, 20)
    wait([row.request.state.grammar.job for row in rows], 20)
    assert masks.wait(CPU).tolist() == [[1], [2], [3]]
    assert [each.threads[0].rpartition("_")[0] for each in (found, sibling, other)] == [
        *("trunkline-mask", "trunkline-slow-mask", "trunkline-mask")
    ]


def test_closing_abandons_the_jobs_that_wait(filler: MaskFiller) -> None:
    """Later sequences of their grammars aren't taken for busy ones: one job runs, the others wait for its thread. Of
    the running one, a sequence would be passed on to the thread for slow masks."""
    spent = MaskTime()
    running, sibling, waiting, slow, slow_waiting = matchers = [Matcher(value) for value in range(5)]
    rows = [row_of(running, spent), row_of(sibling, spent), row_of(waiting)]
    rows += [row_of(matcher, MaskTime()) for matcher in (slow, slow_waiting)]
    states = [row.request.state.grammar for row in rows]
    for state in states[3:]:
        state.spent.slow = True
    filler.start(rows[:2])
    filler.start(rows[2:])
    while not (running.threads and slow.threads):
        time.sleep(0.001)
    filler.close()
    assert [state.job.done() for state in states] == [False, False, True, False, True]
    running.slow = True
    for matcher in matchers:
        matcher.gate.set()
    wait([state.job for state in states], 20)
    assert [state._kept.result().busy for state in states] == [0] * 5
    assert [state.ready for state in states] == [True, False, False, True, False]


def test_sequences_without_compiled_grammar_are_late(filler: MaskFiller, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masks_module, "WAIT_SECONDS", 0.0)
    compiling: Future[KeptGrammar] = Future()
    state = GrammarState(Grammar("regex", "a"), compiling, lambda used: compiling, MaskTime(), [5])
    masks = filler.start([SimpleNamespace(request=SimpleNamespace(state=SimpleNamespace(grammar=state)))])  # type: ignore[list-item]
    assert masks is not None
    assert masks.jobs == []
    assert masks.wait(CPU).tolist() == [[-1]]
    assert state.late
