"""The engine's end of the worker processes that compile grammars for trial."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import weakref
from queue import Empty, SimpleQueue
from typing import IO

import msgspec

from trunkline.core.errors import RequestError
from trunkline.plugins.generation.schemas import Grammar

from .llguidance_source import Vocabulary
from .worker import OUTSIDE, Answer, Question, read_frame, write_frame

log = logging.getLogger("trunkline.generation")

COMMAND = (sys.executable, "-m", "trunkline.plugins.generation.grammar.worker")
SECONDS = 3.0  # of CPU time that a grammar may take
BUSY = (
    "The server is too busy, or has too little memory, to compile this {kind} grammar now: its process was ended by "
    "{signal}. Try again later."
)


class TrialProcess:
    """One worker. Only one thread at a time may use it."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        """Start it. RuntimeError if it doesn't."""
        self._process = subprocess.Popen(
            COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )  # a session of its own: Ctrl-C in the terminal mustn't reach it, and `end` reaches its children
        self.close = weakref.finalize(self, end, self._process)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._requests: IO[bytes] = self._process.stdin
        self._answers: IO[bytes] = self._process.stdout
        self._ask(vocabulary, "the process that compiles grammars didn't start; the log has the reason")

    def try_out(self, grammar: Grammar, seconds: float) -> Answer:
        """The worker's answer. RuntimeError if it has ended."""
        return self._ask(Question(grammar, seconds), "the process that compiles grammars ended")

    @property
    def ended(self) -> bool:
        return not self.close.alive

    def _ask(self, question: Vocabulary | Question, problem: str) -> Answer:
        """The answer. RuntimeError with ``problem`` if the process ended."""
        with contextlib.suppress(OSError, ValueError):  # ValueError: closed by another thread
            write_frame(self._requests, question)  # type: ignore[arg-type]
            frame = read_frame(self._answers)  # type: ignore[arg-type]
            if frame is not None:
                return msgspec.msgpack.decode(frame, type=Answer)
        self.close()
        raise RuntimeError(problem)


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill a worker and its child."""
    with contextlib.suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()


class Trials:
    """Starts workers as needed: as many as threads call :meth:`try_out` at a time."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._idle: SimpleQueue[TrialProcess] = SimpleQueue()
        self._busy: set[TrialProcess] = set()

    def try_out(self, grammar: Grammar, seconds: float = SECONDS) -> Answer | None:
        """The grammar's source and size; None if it takes more than ``seconds`` of CPU time.

        ValueError with the reason for the client, which the grammar is; RequestError if the reason is the machine's
        load; RuntimeError.
        """
        try:
            process = self._idle.get_nowait()
        except Empty:
            process = TrialProcess(self._vocabulary)
        self._busy.add(process)
        try:
            answer = process.try_out(grammar, seconds)
        finally:
            self._busy.discard(process)
            if not process.ended:
                self._idle.put(process)
        if answer.reason:
            raise ValueError(answer.reason)
        if answer.signal == signal.SIGPROF:
            return None
        if answer.signal:
            log.warning("a grammar of %d characters ended its process: signal %d", len(grammar.text), answer.signal)
            if answer.signal in OUTSIDE:
                name = signal.Signals(answer.signal).name
                raise RequestError(BUSY.format(kind=grammar.kind, signal=name), status=503)
            raise ValueError("it is too deeply nested, or needs too much memory")
        return answer

    def cancel(self) -> None:
        """End the workers that are at work, for another thread: it gets a RuntimeError."""
        for process in list(self._busy):
            process.close()
