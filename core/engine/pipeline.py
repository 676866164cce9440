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
        self._passes = 0
        self._last_pass = dict.fromkeys(lanes, 0)  # of each lane, by number

    @property
    def busy(self) -> bool:
        """Whether a batch is in flight, or a lane has something to compute."""
        return self._in_flight is not None or bool(self._busy_lanes())

    def _busy_lanes(self) -> list[Lane]:
        return [lane for lane in self._lanes if lane.busy and not lane.halted]

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
        beside = [other.scheduler for other in self._busy_lanes() if other is not lane]
        batch = lane.scheduler.plan(ahead=previous is not None, beside=beside)
        if batch is None:
            return None
        self._passes += 1
        self._last_pass[lane] = self._passes
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

        One in which requests decode waits for at most one pass of each other lane. Lanes with less device time were
        idle, halted or waited; theirs is raised to the same value, so that they get no more than others.
        """
        busy = self._busy_lanes()
        if len(busy) > 1:
            decoding = [self._last_pass[lane] for lane in busy if lane.scheduler.delay is not None]
            busy = [lane for lane in busy if self._last_pass[lane] <= min(decoding, default=self._passes)]
        if not busy:
            return None
        chosen = min(busy, key=lambda lane: lane.device_seconds)
        for lane in self._lanes:
            lane.device_seconds = max(lane.device_seconds, chosen.device_seconds)
        return chosen
