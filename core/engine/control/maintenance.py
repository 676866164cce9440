"""Controls of the engine process that concern no single request: cache, plugins, garbage collection, log, speed."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Annotated, Any, Protocol

import msgspec
from msgspec import Meta, Struct

from trunkline.core.engine.contracts import enable
from trunkline.core.engine.lane import Lane
from trunkline.core.engine.messages import Answer, Call
from trunkline.core.engine.scheduling.batch import Batch
from trunkline.core.types import Step

MAX_SLEEP = 10.0  # seconds; calls and aborts are delayed by as much

AfterPass = Callable[[Lane, Batch, Sequence[Step]], None]
"""Called by the loop after each pass."""


class SlowDown(Struct, kw_only=True):
    """Arguments of the control ``slow_down``. ``forward_sleep_time``: seconds."""

    forward_sleep_time: Annotated[float, Meta(le=MAX_SLEEP)] | None = None


class MaintainableLoop(Protocol):
    """The part of the engine loop that is used here."""

    lanes: list[Lane]
    after_pass: list[AfterPass]

    def not_admitted(self, lane: Lane) -> int: ...

    def send(self, messages: list[Any]) -> None: ...
    def long_work(self, description: str) -> AbstractContextManager[None]: ...


class Maintenance:
    """The controls ``flush_cache``, ``enable_plugin``, ``freeze_gc``, ``log_level`` and ``slow_down``."""

    def __init__(self, loop: MaintainableLoop) -> None:
        self._loop = loop
        self._sleep_seconds = 0.0
        self.controls: dict[str, Callable[[Lane, Call], None]] = {
            "flush_cache": lambda lane, call: self._answer(call, self._flush(lane)),
            "enable_plugin": self.enable_plugin,
            "freeze_gc": self.freeze_gc,
            "log_level": self.log_level,
            "slow_down": self.slow_down,
        }

    def _flush(self, lane: Lane) -> bool:
        """Empty the prefix cache, unless a request runs, or one waits in a lane that isn't halted."""
        return (lane.halted or not self._loop.not_admitted(lane)) and lane.flush()

    def enable_plugin(self, _: Lane, call: Call) -> None:
        """Switch a plugin's tasks on again. The answer is their names. RequestError 404 for an unknown plugin."""
        stages = [stage for lane in self._loop.lanes for stage in lane.stages.values()]
        self._answer(call, enable(stages, **call.arguments))

    def freeze_gc(self, _: Lane, call: Call) -> None:
        """Exempt all objects that exist now from garbage collection. The answer is their number."""
        gc.collect()
        gc.freeze()
        self._answer(call, gc.get_freeze_count())

    def log_level(self, _: Lane, call: Call) -> None:
        """Set the log level of the process; the route has checked its name."""
        logging.getLogger().setLevel(call.arguments["level"].upper())
        self._answer(call)

    def slow_down(self, _: Lane, call: Call) -> None:
        """Sleep after each pass. None, 0 or a negative number ends it."""
        arguments = msgspec.convert(call.arguments, SlowDown)
        if self._sleep in self._loop.after_pass:
            self._loop.after_pass.remove(self._sleep)
        self._sleep_seconds = max(0.0, arguments.forward_sleep_time or 0.0)
        if self._sleep_seconds:
            self._loop.after_pass.append(self._sleep)
        self._answer(call)

    def _sleep(self, lane: Lane, batch: Batch, steps: Sequence[Step]) -> None:
        with self._loop.long_work("sleeping after each pass, as /slow_down said"):
            time.sleep(self._sleep_seconds)

    def _answer(self, call: Call, value: Any = None) -> None:
        self._loop.send([Answer(call.key, value)])
