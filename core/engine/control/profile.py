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
from typing import Annotated, Any, Protocol

import msgspec
from msgspec import Meta, Struct
from torch.profiler import ProfilerActivity, profile

from trunkline.core.engine.batch import Batch
from trunkline.core.engine.lane import Lane
from trunkline.core.engine.messages import Answer, Call
from trunkline.core.errors import RequestError
from trunkline.core.types import Step

from .maintenance import AfterPass

log = logging.getLogger("trunkline.engine")

MOST_STEPS = 1000  # passes; what is recorded lies in memory until it is written
FOLDER_VARIABLE = "SGLANG_TORCH_PROFILER_DIR"
RUNNING = "Profiling is already in progress. Call /stop_profile first."  # SGLang's words
NOT_RUNNING = "Profiling is not in progress. Call /start_profile first."

Steps = Annotated[int, Meta(ge=0, lt=1 << 62)]


class Order(Struct, kw_only=True):
    """Arguments of the control ``start_profile``; passes are counted since the engine's start."""

    start_step: Steps | None = None
    num_steps: Steps | None = None
    memory: bool = False
    with_stack: bool = False
    record_shapes: bool = False


class ProfiledLoop(Protocol):
    """What is needed of the engine loop."""

    passes: int
    after_pass: list[AfterPass]

    def send(self, messages: list[Any]) -> None: ...
    def long_work(self, what: str) -> AbstractContextManager[None]: ...


class Profiles:
    """The controls ``start_profile`` and ``stop_profile``; one profile at a time."""

    def __init__(self, loop: ProfiledLoop) -> None:
        self._loop = loop
        self._order: Order | None = None  # of the profile that is wanted or runs
        self._profile: profile | None = None  # that runs
        self._end = 0  # count of passes at which it ends
        self.controls: dict[str, Callable[[Lane, Call], None]] = {
            "start_profile": self.start,
            "stop_profile": self.stop,
        }

    def start(self, _: Lane, call: Call) -> None:
        """Record from now on, or from a pass to come."""
        order = msgspec.convert(call.arguments, Order)
        if self._order is not None:
            raise RequestError(RUNNING)
        _folder()  # now, so that the caller learns that there is none
        self._order = order
        self._loop.after_pass.append(self._passed)
        if order.start_step is None or order.start_step <= self._loop.passes:
            self._begin(order)
        self._loop.send([Answer(call.key)])

    def stop(self, _: Lane, call: Call) -> None:
        """Record no more, and write what was recorded; the file's path."""
        if self._order is None:
            raise RequestError(NOT_RUNNING)
        self._loop.send([Answer(call.key, self._finish())])

    def _begin(self, order: Order) -> None:
        self._profile = profile(
            activities=[ProfilerActivity.CPU],
            record_shapes=order.record_shapes,
            profile_memory=order.memory,
            with_stack=order.with_stack,
        )
        self._profile.start()
        self._end = self._loop.passes + min(order.num_steps or MOST_STEPS, MOST_STEPS)

    def _passed(self, lane: Lane, batch: Batch, steps: Sequence[Step]) -> None:
        """A pass has ended, which the loop hasn't counted yet."""
        order, passes = self._order, self._loop.passes + 1
        assert order is not None
        if self._profile is None:
            if passes >= (order.start_step or 0):
                self._begin(order)
                self._end += 1
        elif passes >= self._end:
            self._finish()

    def _finish(self) -> str:
        """Path of the trace, "" where nothing was recorded or it couldn't be written."""
        running, self._profile, self._order = self._profile, None, None
        self._loop.after_pass.remove(self._passed)
        if running is None:
            return ""
        with self._loop.long_work("writing a profile"):
            path = ""
            try:
                running.stop()
                path = str(
                    _folder() / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}-{time.monotonic_ns()}.trace.json.gz"
                )
                running.export_chrome_trace(path)
                log.info("a profile was written to %s", path)
            except Exception:  # of the disk, or of the profiler
                log.exception("the profile could not be written")
                path = ""
        return path


def _folder() -> Path:
    """The folder of traces, made if missing."""
    chosen = os.environ.get(FOLDER_VARIABLE)
    try:
        if not chosen:
            return _private_folder()
        folder = Path(chosen)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(f"The folder of profiles, {chosen} ({FOLDER_VARIABLE}), can't be made: {error}.") from error
    return folder


@functools.cache
def _private_folder() -> Path:
    """A folder that nobody else can read, one a process."""
    folder = Path(tempfile.mkdtemp(prefix="trunkline-profiles-"))
    log.info("profiles go to %s; %s names another folder", folder, FOLDER_VARIABLE)
    return folder
