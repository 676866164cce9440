"""The engine's end of the worker process that compiles grammars for trial."""

from __future__ import annotations

import contextlib
import logging
import signal
import subprocess
import sys
import weakref
from queue import Empty, SimpleQueue
from typing import IO

import msgspec

from trunkline.plugins.generation.schemas import Grammar

from .llguidance_source import Vocabulary
from .worker import CPU_SECONDS, read_frame, write_frame

log = logging.getLogger("trunkline.generation")

COMMAND = (sys.executable, "-m", "trunkline.plugins.generation.grammar.worker")


class TrialProcess:
    """One worker. Only one thread at a time may use it."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        """Start it. RuntimeError if it doesn't."""
        self._process = subprocess.Popen(
            COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )  # a session of its own: Ctrl-C in the terminal mustn't reach it
        self._finalizer = weakref.finalize(self, end, self._process)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._requests: IO[bytes] = self._process.stdin
        self._answers: IO[bytes] = self._process.stdout
        if self._ask(vocabulary) != ["ready"]:
            self.close()
            raise RuntimeError("the process that compiles grammars didn't start; the log has the reason")

    def try_out(self, grammar: Grammar) -> str | None:
        """The grammar's source for llguidance. ValueError with the reason for the client. None: the process ended."""
        answer = self._ask(grammar)
        if answer is None:
            self.close()
            return None
        if answer[0] != "ok":
            raise ValueError(answer[1])
        return answer[1]

    @property
    def exit_status(self) -> int | None:
        """Negative: the number of the signal that ended it."""
        return self._process.returncode

    def close(self) -> None:
        self._finalizer()

    def _ask(self, question: Vocabulary | Grammar) -> list[str] | None:
        """The answer, None if the process ended."""
        with contextlib.suppress(OSError):
            write_frame(self._requests, question)  # type: ignore[arg-type]
            frame = read_frame(self._answers)  # type: ignore[arg-type]
            if frame is not None:
                return msgspec.msgpack.decode(frame, type=list[str])
        return None


def end(process: subprocess.Popen[bytes]) -> None:
    """Close the pipes, upon which a worker exits, and wait for its end."""
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()
    try:
        process.wait(timeout=5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


class Trials:
    """Starts workers as needed: as many as threads call :meth:`try_out` at a time."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._idle: SimpleQueue[TrialProcess] = SimpleQueue()

    def try_out(self, grammar: Grammar) -> str:
        """The grammar's source for llguidance. ValueError with the reason for the client; RuntimeError."""
        try:
            process = self._idle.get_nowait()
        except Empty:
            process = TrialProcess(self._vocabulary)
        ended = True
        try:
            source = process.try_out(grammar)
            ended = source is None
        except ValueError:
            ended = False
            raise
        finally:
            if not ended:
                self._idle.put(process)
        if source is None:
            status = process.exit_status
            log.warning("a grammar of %d characters ended its process: status %s", len(grammar.text), status)
            raise ValueError(
                f"it takes more than {CPU_SECONDS} s of CPU time"
                if status == -signal.SIGXCPU
                else "it is too deeply nested, or needs too much memory"
            )
        return source
