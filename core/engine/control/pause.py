"""Pauses and continues lanes: a paused lane computes nothing, and its requests wait."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import msgspec
from msgspec import Struct

from trunkline.core.engine.lane import Lane
from trunkline.core.engine.messages import Answer, Call
from trunkline.core.errors import RequestError
from trunkline.core.types import Request, Step

log = logging.getLogger("trunkline.engine")


class Pause(Struct, kw_only=True):
    """Arguments of the control ``pause``."""

    mode: Literal["abort", "retract", "in_place"] = "abort"


class PausableLoop(Protocol):
    """What pausing needs of the engine loop."""

    requests: dict[int, tuple[Lane, Request]]

    def send(self, messages: list[Any]) -> None: ...
    def report(self, lane: Lane, steps: Sequence[Step]) -> None: ...
    def abort_all(self, lane: Lane, *, probes_only: bool = False) -> None: ...


class Pauser:
    """The controls ``pause``, ``continue`` and ``drain``.

    A second pause in another mode does what that mode does beside. An engine that is started in place of one that
    was lost is told which lanes were paused.
    """

    def __init__(self, loop: PausableLoop, changed: Callable[[], None]) -> None:
        """``changed`` tells the front what the lanes are now."""
        self._loop = loop
        self._changed = changed
        self.controls: dict[str, Callable[[Lane, Call], None]] = {
            "pause": self.pause,
            "continue": self.go_on,
            "drain": self.drain,
        }

    def pause(self, lane: Lane, call: Call) -> None:
        """Compute nothing more. ``abort`` ends all requests; ``retract`` queues them again, which frees their slots;
        ``in_place`` leaves them where they are."""
        mode = msgspec.convert(call.arguments, Pause).mode
        if mode == "abort":
            self._loop.abort_all(lane)
        else:
            self._loop.abort_all(lane, probes_only=True)
        if mode == "retract":
            self._loop.report(lane, lane.retract())
        lane.paused = True
        self._changed()
        scheduler = lane.scheduler
        log.info(
            "%s is paused (%s): %d requests keep their slots, %d wait",
            lane.served.name, mode, scheduler.running, scheduler.waiting,
        )  # fmt: skip
        self._loop.send([Answer(call.key)])

    def go_on(self, lane: Lane, call: Call) -> None:
        """End the pause; harmless without one."""
        if lane.paused:
            lane.paused = False
            self._changed()
            log.info("%s goes on: %d requests", lane.served.name, lane.scheduler.running + lane.scheduler.waiting)
        self._loop.send([Answer(call.key)])

    def drain(self, lane: Lane, call: Call) -> None:
        """The server is about to stop: end the pause, or the requests, where released memory forbids going on."""
        if lane.released:
            error = RequestError("The server is shutting down, and the model's memory is released.", status=503)
            steps = [Step(request, error=error) for owner, request in self._loop.requests.values() if owner is lane]
            for step in steps:
                lane.end(step.request)
            self._loop.report(lane, steps)
        self.go_on(lane, call)
