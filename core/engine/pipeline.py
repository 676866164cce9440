"""Which lane computes next; and that at most one batch is in flight while the next one is prepared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from trunkline.core.types import Request, Step

from .flight import BatchInFlight
from .lane import Lane
from .scheduling.batch import Batch


class Flight(NamedTuple):
    """A batch in flight, and its lane."""

    lane: Lane
    batch: BatchInFlight


class Pipeline:
    """Starts the lanes' batches one after another, and collects each after the next one was started.

    Where the device doesn't overlap with the host, each is collected at once.
    """

    def __init__(
        self,
        lanes: Sequence[Lane],
        started: Callable[[Sequence[Request]], None],
        finished: Callable[[Lane, Batch, list[Step]], None],
    ) -> None:
        """``started`` is called with the requests that run for the first time, ``finished`` with a batch's steps."""
        self._lanes = lanes
        self._started = started
        self._finished = finished
        self._in_flight: Flight | None = None
        self._finished_at = 0.0  # when the last batch was collected

    @property
    def busy(self) -> bool:
        """Whether a batch is in flight, or a lane has something to compute."""
        return self._in_flight is not None or any(lane.busy and not lane.halted for lane in self._lanes)

    def advance(self) -> bool:
        """Start the next batch if there is one, then collect the one before it. Whether a batch is in flight now."""
        started = self._start()
        self._collect(started)
        if started is not None and not started.batch.cancelled:
            self._in_flight = started
            if not started.lane.overlaps:
                self.drain()
        return self._in_flight is not None

    def drain(self) -> None:
        """Collect the batch in flight, if there is one."""
        self._collect(None)

    def _start(self) -> Flight | None:
        """None if nothing is left to compute, or it depends on the results of the batch in flight."""
        lane = self.next_lane()
        if lane is None:
            return None
        flight = self._in_flight
        previous = flight.batch if flight is not None and flight.lane is lane else None
        if previous is not None and previous.failed:
            return None
        batch = lane.scheduler.plan(ahead=previous is not None)
        if batch is None:
            return None
        self._started(batch.started)
        return Flight(lane, lane.start(batch, previous))

    def _collect(self, following: Flight | None) -> None:
        """``following`` was started after the batch in flight."""
        if self._in_flight is None:
            return
        (lane, flight), self._in_flight = self._in_flight, None
        next_batch = following.batch if following is not None and following.lane is lane else None
        steps = lane.finish(flight, next_batch, after=self._finished_at)
        self._finished_at = lane.finished_at
        self._finished(lane, flight.batch, steps)

    def next_lane(self) -> Lane | None:
        """Of the lanes that are busy and not halted, the one with the least device time; None if there is none.

        Lanes with less were idle or halted; theirs is raised to the same value, so that they get no more than others.
        """
        busy = [lane for lane in self._lanes if lane.busy and not lane.halted]
        if not busy:
            return None
        chosen = min(busy, key=lambda lane: lane.device_seconds)
        for lane in self._lanes:
            lane.device_seconds = max(lane.device_seconds, chosen.device_seconds)
        return chosen
