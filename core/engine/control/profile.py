"""Profiles the engine's passes with torch.profiler, and writes traces for chrome://tracing and Perfetto."""

from __future__ import annotations

import functools
import logging
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import msgspec
from msgspec import Struct
from torch.profiler import ProfilerActivity, profile

from trunkline.core.engine.lane import Lane
from trunkline.core.engine.messages import Answer, Call
from trunkline.core.engine.scheduling.batch import Batch
from trunkline.core.errors import RequestError
from trunkline.core.types import Count, Step

from .maintenance import AfterPass

log = logging.getLogger("trunkline.engine")

MAX_PASSES = 1000  # of one profile, which is in memory until it is written
FOLDER_VARIABLE = "SGLANG_TORCH_PROFILER_DIR"
ALREADY_RUNNING = "Profiling is already in progress. Call /stop_profile first."  # SGLang's text
NOT_RUNNING = "Profiling is not in progress. Call /start_profile first."


class ProfileArguments(Struct, kw_only=True):
    """Arguments of the control ``start_profile``. ``start_step``: a number of passes since the engine's start."""

    start_step: Count | None = None
    num_steps: Count | None = None
    memory: bool = False
    with_stack: bool = False
    record_shapes: bool = False


class ProfiledLoop(Protocol):
    """The part of the engine loop that is used here."""

    passes: int
    after_pass: list[AfterPass]

    def send(self, messages: list[Any]) -> None: ...
    def long_work(self, description: str) -> AbstractContextManager[None]: ...


class Profiles:
    """The controls ``start_profile`` and ``stop_profile``; one profile at a time."""

    def __init__(self, loop: ProfiledLoop) -> None:
        self._loop = loop
        self._arguments: ProfileArguments | None = None  # of the requested profile, whether it has begun or not
        self._profile: profile | None = None  # set while it records
        self._end = 0  # it ends after this pass, counted since the engine's start
        self.controls: dict[str, Callable[[Lane, Call], None]] = {
            "start_profile": self.start,
            "stop_profile": self.stop,
        }

    def start(self, _: Lane, call: Call) -> None:
        """Record from now on, or from the pass ``start_step`` on. RequestError when a profile was started before."""
        arguments = msgspec.convert(call.arguments, ProfileArguments)
        if self._arguments is not None:
            raise RequestError(ALREADY_RUNNING)
        _trace_folder()  # if it can't be made, the caller gets the error now
        self._arguments = arguments
        self._loop.after_pass.append(self._after_pass)
        if arguments.start_step is None or arguments.start_step <= self._loop.passes:
            self._begin(arguments)
        self._loop.send([Answer(call.key)])

    def stop(self, _: Lane, call: Call) -> None:
        """Stop recording and write the trace. The answer is its path, see :meth:`_finish`."""
        if self._arguments is None:
            raise RequestError(NOT_RUNNING)
        self._loop.send([Answer(call.key, self._finish())])

    def _begin(self, arguments: ProfileArguments) -> None:
        self._profile = profile(
            activities=[ProfilerActivity.CPU],
            record_shapes=arguments.record_shapes,
            profile_memory=arguments.memory,
            with_stack=arguments.with_stack,
        )
        self._profile.start()
        self._end = self._loop.passes + min(arguments.num_steps or MAX_PASSES, MAX_PASSES)

    def _after_pass(self, lane: Lane, batch: Batch, steps: Sequence[Step]) -> None:
        """Begin or end the profile if it is due. The loop calls this before it counts the pass."""
        arguments, passes = self._arguments, self._loop.passes + 1
        assert arguments is not None
        if self._profile is None:
            if passes >= (arguments.start_step or 0):
                self._begin(arguments)
                self._end += 1
        elif passes >= self._end:
            self._finish()

    def _finish(self) -> str:
        """Returns the path of the trace; "" if nothing was recorded, or the trace couldn't be written."""
        running, self._profile, self._arguments = self._profile, None, None
        self._loop.after_pass.remove(self._after_pass)
        if running is None:
            return ""
        with self._loop.long_work("writing a profile"):
            path = ""
            try:
                running.stop()
                name = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}-{time.monotonic_ns()}.trace.json.gz"
                path = str(_trace_folder() / name)
                running.export_chrome_trace(path)
                log.info("a profile was written to %s", path)
            except Exception:  # OSError, or any error of the profiler
                log.exception("the profile could not be written")
                path = ""
        return path


def _trace_folder() -> Path:
    """The folder of traces, which is made if it is missing. RequestError when it can't be made."""
    configured = os.environ.get(FOLDER_VARIABLE)
    try:
        if not configured:
            return _private_folder()
        folder = Path(configured)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(
            f"The folder of profiles, {configured} ({FOLDER_VARIABLE}), can't be made: {error}."
        ) from error
    return folder


@functools.cache
def _private_folder() -> Path:
    """A folder that only this user can read; the same one for the life of the process."""
    folder = Path(tempfile.mkdtemp(prefix="trunkline-profiles-"))
    log.info("profiles are written to %s; set %s for another folder", folder, FOLDER_VARIABLE)
    return folder
