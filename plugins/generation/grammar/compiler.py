"""Compiles grammars in threads.

Two threads compile what takes a moment. A grammar that takes longer is passed on to a third thread, so that others
needn't wait for it.
"""

from __future__ import annotations

import logging
import threading
from concurrent.futures import Future
from typing import Any
from weakref import WeakSet

import numpy as np

from trunkline.core.errors import RequestError, describe_error
from trunkline.core.types import Contribution
from trunkline.plugins.generation.hooks import CompiledGrammar
from trunkline.plugins.generation.schemas import Grammar

from .kept import GrammarCache, KeptGrammar, Refusal
from .threads import Lane

log = logging.getLogger("trunkline.generation")

THREADS, SLOW_THREADS = 2, 1
MAX_WAITING, MAX_SLOW_WAITING = 64, 4  # grammars that wait for these threads
MAX_LIVING = 512 << 20  # bytes of all grammars that are kept, or that requests use
SMALL = 1 << 20  # bytes; grammars up to this size are accepted beyond that limit

FAILED_MESSAGE = "The grammar could not be compiled; the server's log has the reason."
STOPPING = "The server is shutting down."
BUSY = "The server has too many grammars to compile: {} wait already. Try again later."
BUSY_SLOW = "This grammar takes long to compile, and {} such grammars wait already. Simplify it, or try again later."
FULL = "This grammar takes {} MiB, and those of other requests take up the memory for grammars. Try again later."

Outcome = KeptGrammar | Refusal | RequestError


class GrammarCompiler:
    """Compiles the grammars of a model's requests with one engine; equal ones that are wanted together, once."""

    def __init__(self, engine: Contribution | None, vocab_size: int, unavailable: str = "") -> None:
        """``unavailable``: why there is no engine, a sentence for clients in which ``{field}`` is the field's name."""
        self._engine = engine
        self._words = (vocab_size + 31) // 32
        self._unavailable = unavailable
        self._cache = GrammarCache()
        self._futures: WeakSet[Future[KeptGrammar]] = WeakSet()  # a request keeps its Future as long as it runs
        self._waiting: dict[Grammar, list[Future[KeptGrammar]]] = {}
        self._lock = threading.Lock()  # of the four above
        self._quick = Lane("trunkline-grammar", THREADS, MAX_WAITING)
        self._slow = Lane("trunkline-slow-grammar", SLOW_THREADS, MAX_SLOW_WAITING)
        self._users = 0
        self.closed = False

    @property
    def engine(self) -> Any:
        """The engine, None if there is none."""
        return None if self._engine is None else self._engine.value

    def warm_up(self) -> None:
        """Let the engine load what it needs, if it has such a method."""
        warm_up = getattr(self.engine, "warm_up", None)
        if warm_up is not None:
            warm_up()

    def start(self, grammar: Grammar) -> Future[KeptGrammar]:
        """Compile a grammar, unless it is known. The Future's exception is a RequestError."""
        future: Future[KeptGrammar] = Future()
        outcome: Outcome | None
        with self._lock:
            self._futures.add(future)
            outcome = self._cache.get(grammar)
            if outcome is None and self.closed:
                outcome = RequestError(STOPPING, status=503)
            elif outcome is None and grammar in self._waiting:
                self._waiting[grammar].append(future)
            elif outcome is None:
                self._waiting[grammar] = [future]
                if not self._quick.submit(lambda: self._run(grammar, quick=True)):
                    del self._waiting[grammar]
                    outcome = RequestError(BUSY.format(MAX_WAITING), status=503)
        if outcome is not None:
            _resolve(future, grammar, outcome)
        return future

    def renew(self, grammar: Grammar, used_up: KeptGrammar) -> Future[KeptGrammar]:
        """Compile a grammar anew, if ``used_up`` is what :meth:`start` would return."""
        with self._lock:
            self._cache.drop(grammar, used_up)
        return self.start(grammar)

    def open(self) -> None:
        """Called by each user."""
        self._users += 1

    def close(self) -> None:
        """Called by each user at the end; after the last one, who waits for a grammar gets an error."""
        self._users -= 1
        if self._users:
            return
        with self._lock:
            self.closed = True
            waiting, self._waiting = self._waiting, {}
        self._quick.close()
        self._slow.close()
        cancel = getattr(self.engine, "cancel", None)
        if cancel is not None:
            cancel()
        for grammar, futures in waiting.items():
            for future in futures:
                _resolve(future, grammar, RequestError(STOPPING, status=503))

    def _run(self, grammar: Grammar, *, quick: bool) -> None:
        """Compile a grammar for the requests that wait for it. In a thread."""
        with self._lock:
            if all(future.cancelled() for future in self._waiting.get(grammar, ())):
                self._waiting.pop(grammar, None)
                return
        outcome: Outcome | None
        try:
            outcome = self._compile(grammar, quick=quick)
        except BaseException as error:  # of a plugin, SystemExit too
            outcome = self._failure(error)
        if outcome is None:
            if self._slow.submit(lambda: self._run(grammar, quick=False)):
                return
            outcome = RequestError(BUSY_SLOW.format(MAX_SLOW_WAITING), status=503)
        with self._lock:
            waiting = self._waiting.pop(grammar, [])
            if isinstance(outcome, KeptGrammar):
                outcome = self._with_memory(outcome)
            if not isinstance(outcome, RequestError):
                self._cache.put(grammar, outcome)
        for future in waiting:
            _resolve(future, grammar, outcome)

    def _with_memory(self, kept: KeptGrammar) -> KeptGrammar | RequestError:
        """The grammar, or an error if it and those that are in use take too much memory together."""
        if kept.nbytes <= SMALL:
            return kept
        ended = [future for future in self._futures if future.done() and not future.cancelled()]
        used = {kept, *(future.result() for future in ended if future.exception() is None)}
        free = MAX_LIVING - sum(each.nbytes for each in used)
        if free < 0:
            return RequestError(FULL.format(kept.nbytes >> 20), status=503)
        self._cache.limit_unused(used, free)
        return kept

    def _compile(self, grammar: Grammar, *, quick: bool) -> Outcome | None:
        """None: it takes longer than a moment. A RequestError isn't the client's fault, so that another try may
        succeed; or there is no engine."""
        if self._engine is None:
            return RequestError(self._unavailable.format(field=grammar.kind), param=grammar.kind)
        engine: Any = self._engine.value
        compile_ = (quick and getattr(engine, "compile_quickly", None)) or engine.compile
        try:
            compiled: CompiledGrammar | None = compile_(grammar)
            if compiled is None:
                return None
            first = np.empty(self._words, np.int32)
            compiled.matcher().fill(first)
            first.flags.writeable = False
            return KeptGrammar(compiled, first)
        except ValueError as error:
            return Refusal(str(error))

    def _failure(self, error: BaseException) -> RequestError:
        """For clients, what the engine raised."""
        if self.closed:
            return RequestError(STOPPING, status=503)
        if isinstance(error, RequestError):
            return error
        assert self._engine is not None
        message = f"{type(self.engine).__name__}.compile raised {describe_error(error)}"
        log.error("%s", self._engine.failed(message), exc_info=error)
        return RequestError(FAILED_MESSAGE, status=500)


def _resolve(future: Future[KeptGrammar], grammar: Grammar, outcome: Outcome) -> None:
    if not future.set_running_or_notify_cancel():
        return
    if isinstance(outcome, Refusal):
        future.set_exception(outcome.error(grammar))
    elif isinstance(outcome, RequestError):
        future.set_exception(RequestError(outcome.message, status=outcome.status, param=outcome.param))
    else:
        future.set_result(outcome)
