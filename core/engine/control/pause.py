"""Pauses and continues lanes: a paused lane computes nothing, and its requests wait."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import msgspec
from msgspec import Struct

from trunkline.core.engine.lane import Lane
from trunkline.core.engine.messages import Answer, Call, Heartbeat
from trunkline.core.errors import RequestError
from trunkline.core.types import Request, Step

log = logging.getLogger("trunkline.engine")


class PauseArguments(Struct, kw_only=True):
    """Arguments of the control ``pause``."""

    mode: Literal["abort", "retract", "in_place"] = "abort"


class PausableLoop(Protocol):
    """The part of the engine loop that is used here."""

    requests: dict[int, tuple[Lane, Request]]

    def send(self, messages: list[Any]) -> None: ...
    def heartbeat(self) -> Heartbeat: ...
    def report(self, lane: Lane, steps: Sequence[Step]) -> None: ...
    def abort_all(self, lane: Lane, *, probes_only: bool = False) -> None: ...


class Pauser:
    """The controls ``pause``, ``continue`` and ``drain``.

    A second pause in another mode applies that mode as well. An engine process that replaces a crashed one is told by
    the front which lanes were paused.
    """

    def __init__(self, loop: PausableLoop, send_models: Callable[[], None]) -> None:
        """``send_models`` sends the front the state of all lanes."""
        self._loop = loop
        self._send_models = send_models
        self.controls: dict[str, Callable[[Lane, Call], None]] = {
            "pause": self.pause,
            "continue": self.resume,
            "drain": self.drain,
        }

    def pause(self, lane: Lane, call: Call) -> None:
        """Stop computing. ``abort`` ends all requests; ``retract`` queues running ones again, which frees their slots;
        with ``in_place`` they keep their slots."""
        mode = msgspec.convert(call.arguments, PauseArguments).mode
        self._loop.abort_all(lane, probes_only=mode != "abort")
        if mode == "retract":
            self._loop.report(lane, lane.retract())
        lane.paused = True
        self._send_models()
        scheduler = lane.scheduler
        log.info(
            "%s is paused (%s): %d requests keep their slots, %d wait",
            lane.served.name, mode, scheduler.running, scheduler.waiting,
        )  # fmt: skip
        self._loop.send([self._loop.heartbeat(), Answer(call.key)])

    def resume(self, lane: Lane, call: Call) -> None:
        """End the pause. Does nothing without one."""
        if lane.paused:
            lane.paused = False
            self._send_models()
            log.info("%s continues with %d requests", lane.served.name, lane.scheduler.running + lane.scheduler.waiting)
        self._loop.send([self._loop.heartbeat(), Answer(call.key)])

    def drain(self, lane: Lane, call: Call) -> None:
        """Called before the server stops: end the pause, or, while memory is released, the requests (with a 503)."""
        if lane.released:
            error = RequestError("The server is shutting down, and the model's memory is released.", status=503)
            steps = [Step(request, error=error) for owner, request in self._loop.requests.values() if owner is lane]
            for step in steps:
                lane.end(step.request)
            self._loop.report(lane, steps)
        self.resume(lane, call)
