"""Compiles grammars in threads, and keeps the compiled ones."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from trunkline.core.errors import ConfigError, RequestError, describe_error
from trunkline.core.types import Contribution
from trunkline.plugins.generation.hooks import CompiledGrammar
from trunkline.plugins.generation.schemas import Grammar

log = logging.getLogger("trunkline.generation")

OWN = "llguidance"
THREADS = 2
MAX_ENTRIES = 64
MAX_BYTES = 256 << 20
FAILED_MESSAGE = "The grammar could not be compiled; the server's log has the reason."


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a grammar can't be compiled, for the client."""

    reason: str

    def error(self, grammar: Grammar) -> RequestError:
        return RequestError(f"Failed to compile {grammar.kind} grammar: {self.reason}", param=grammar.kind)


class GrammarCache:
    """The most recently used compiled grammars and refusals, bounded in number and bytes."""

    def __init__(self, max_entries: int = MAX_ENTRIES, max_bytes: int = MAX_BYTES) -> None:
        self._max_entries, self._max_bytes = max_entries, max_bytes
        self._entries: OrderedDict[Grammar, CompiledGrammar | Refusal] = OrderedDict()
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, grammar: Grammar) -> CompiledGrammar | Refusal | None:
        entry = self._entries.get(grammar)
        if entry is not None:
            self._entries.move_to_end(grammar)
        return entry

    def drop(self, grammar: Grammar) -> None:
        """Forget an entry, if it is there."""
        if (entry := self._entries.pop(grammar, None)) is not None:
            self.nbytes -= _size(grammar, entry)

    def put(self, grammar: Grammar, entry: CompiledGrammar | Refusal) -> None:
        if grammar not in self._entries:
            self._entries[grammar] = entry
            self.nbytes += _size(grammar, entry)
        while len(self._entries) > self._max_entries or (self.nbytes > self._max_bytes and len(self._entries) > 1):
            self.nbytes -= _size(*self._entries.popitem(last=False))


def _size(grammar: Grammar, entry: CompiledGrammar | Refusal) -> int:
    return 4 * len(grammar.text) + (len(entry.reason) if isinstance(entry, Refusal) else entry.nbytes)


class GrammarCompiler:
    """Compiles the grammars of a model's requests with one engine; equal ones that are wanted together, once."""

    def __init__(self, engine: Contribution | None, unavailable: str = "") -> None:
        """``unavailable``: why there is no engine, a sentence for clients in which ``{field}`` is the field's name."""
        self._engine = engine
        self._unavailable = unavailable
        self._cache = GrammarCache()
        self._waiting: dict[Grammar, list[Future[CompiledGrammar]]] = {}
        self._lock = threading.Lock()  # of the two above
        self._threads = ThreadPoolExecutor(THREADS, "trunkline-grammar", lower_priority)

    @property
    def engine(self) -> Any:
        """The engine, None if there is none."""
        return None if self._engine is None else self._engine.value

    def warm_up(self) -> None:
        """Let the engine load what it needs, if it has such a method."""
        warm_up = getattr(self.engine, "warm_up", None)
        if warm_up is not None:
            warm_up()

    def start(self, grammar: Grammar) -> Future[CompiledGrammar]:
        """Compile a grammar, unless it is known. The Future's exception is a RequestError."""
        future: Future[CompiledGrammar] = Future()
        with self._lock:
            entry = self._cache.get(grammar)
            if entry is None:
                waiting = self._waiting.setdefault(grammar, [])
                waiting.append(future)
                if len(waiting) == 1:
                    self._threads.submit(self._run, grammar)
        if entry is not None:
            _resolve(future, grammar, entry)
        return future

    def forget(self, grammar: Grammar) -> None:
        """Compile the grammar anew for the next request: matchers of llguidance share their lexer and its limits."""
        with self._lock:
            self._cache.drop(grammar)

    def _run(self, grammar: Grammar) -> None:
        """Compile a grammar for the requests that wait for it. In a thread."""
        with self._lock:
            if all(future.cancelled() for future in self._waiting[grammar]):
                del self._waiting[grammar]
                return
        outcome = self._compile(grammar)
        with self._lock:
            waiting = self._waiting.pop(grammar)
            if not isinstance(outcome, RequestError):
                self._cache.put(grammar, outcome)
        for future in waiting:
            _resolve(future, grammar, outcome)

    def _compile(self, grammar: Grammar) -> CompiledGrammar | Refusal | RequestError:
        """The error is not the client's fault, so that another try may succeed; or there is no engine."""
        if self._engine is None:
            return RequestError(self._unavailable.format(field=grammar.kind), param=grammar.kind)
        try:
            compiled: CompiledGrammar = self._engine.value.compile(grammar)
        except ValueError as error:
            return Refusal(str(error))
        except BaseException as error:  # of a plugin, SystemExit too
            message = f"{type(self._engine.value).__name__}.compile raised {describe_error(error)}"
            log.error("%s", self._engine.failed(message), exc_info=error)
            return RequestError(FAILED_MESSAGE, status=500)
        return compiled


def _resolve(
    future: Future[CompiledGrammar], grammar: Grammar, outcome: CompiledGrammar | Refusal | RequestError
) -> None:
    if not future.set_running_or_notify_cancel():
        return
    if isinstance(outcome, Refusal):
        future.set_exception(outcome.error(grammar))
    elif isinstance(outcome, RequestError):
        future.set_exception(RequestError(outcome.message, status=outcome.status, param=outcome.param))
    else:
        future.set_result(outcome)


def choose_engine(contributions: Iterable[Contribution], backend: str) -> GrammarCompiler:
    """The compiler for ``--grammar-backend``. ConfigError for the name of no engine.

    ``contributions``: the grammar engines of plugins. "auto" is llguidance, or the first other one; "none" none.
    """
    engines: dict[str, Contribution] = {}
    for each in contributions:
        name = getattr(each.value, "name", None)
        if not isinstance(name, str) or not callable(getattr(each.value, "compile", None)):
            raise each.failed(f"{type(each.value).__name__} needs a name, a string, and a method compile")
        engines.setdefault(name, each)
    if backend == "none":
        return GrammarCompiler(None, "{field} is switched off on this server (--grammar-backend none); leave it out.")
    if backend == "auto":
        chosen = engines.get(OWN) or next(iter(engines.values()), None)
    elif backend in engines:
        chosen = engines[backend]
    elif backend == OWN:
        chosen = None  # the model has no tokenizer
    else:
        known = ", ".join(dict.fromkeys(("auto", "none", OWN, *engines)))
        raise ConfigError(f"--grammar-backend {backend!r}: there is no such grammar engine; choose one of {known}.")
    return GrammarCompiler(chosen, "{field} needs a tokenizer, and this model has none; leave it out.")


def lower_priority() -> None:
    """Let other threads run before the calling one, where the system can say that of a thread (Linux)."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
