"""The discrete-event simulation: sessions arrive, a policy divides their requests, replicas compute passes."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from cluster.policies import Policy
from cluster.replica import Call, Counts, Replica
from cluster.traffic import Job, Session


@dataclass(frozen=True, kw_only=True)
class Served:
    """How requests were served. Times in seconds; ``waits`` and ``firsts`` (to the first token) since arrival."""

    cached: float  # share of prompt tokens that came from the cache
    waits: NDArray[np.float64]
    firsts: NDArray[np.float64]
    rate: float  # requests per second
    output_rate: float  # tokens per second

    def wait(self, percent: float) -> float:
        """A percentile of the waits."""
        return float(np.percentile(self.waits, percent))

    def first(self, percent: float) -> float:
        """A percentile of the times to the first token."""
        return float(np.percentile(self.firsts, percent))


@dataclass(frozen=True, kw_only=True)
class Outcome(Served):
    """What a simulation found."""

    busy: float  # share of the time in which replicas compute, on average …
    busiest: float  # … and of the busiest one
    pool: float  # share of the slots that requests hold while passes run, on average
    imbalance: float  # prompt tokens that the busiest replica computed ÷ the mean
    retracted: int
    routing: float  # seconds of the policy per request, measured


class Simulation:
    """One run. Events are ordered by time, then by when they were added, so that a run can be repeated exactly."""

    def __init__(self, replicas: Sequence[Replica], policy: Policy) -> None:
        self._replicas, self._policy = replicas, policy
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._added = 0
        self._sent = 0
        self._calls: list[Call] = []
        self._until = 0.0
        self._counts: list[Counts] = []
        self._following: dict[int, Callable[[float], None]] = {}  # by key, what happens when a request has ended

    def run(self, sessions: Iterable[Session], *, start: float, end: float) -> Outcome:
        """Simulate until all requests that arrive before ``end`` seconds have ended; those after ``start`` count."""
        self._until = end
        self._add(start, lambda _: self._count_from_now())
        for session in sessions:
            if session.turns:
                self._turn(session.at, session.jobs)
            else:
                for job in session.jobs:
                    self._add(session.at, partial(self._submit, job=job))
        self._add(end, lambda _: self._count_no_more())
        self._heartbeat(1.0)
        while self._events:
            now, _, happen = heapq.heappop(self._events)
            happen(now)
        return self._outcome(start, end)

    def _count_from_now(self) -> None:
        for replica in self._replicas:
            replica.counts = Counts()

    def _count_no_more(self) -> None:
        self._counts = [replica.counts for replica in self._replicas]
        self._count_from_now()

    def _add(self, at: float, happen: Callable[[float], None]) -> None:
        self._added += 1
        heapq.heappush(self._events, (at, self._added, happen))

    def _heartbeat(self, at: float) -> None:
        """Heartbeats once a second."""
        self._policy.heartbeat()
        if at < self._until:
            self._add(at, lambda now: self._heartbeat(now + 1.0))

    def _turn(self, now: float, jobs: list[Job]) -> None:
        """The next turn of a chat, and those after it."""
        if jobs:
            self._add(now + jobs[0].after, lambda then: self._submit(then, jobs[0], jobs[1:]))

    def _submit(self, now: float, job: Job, turns: Sequence[Job] = ()) -> None:
        if now >= self._until:
            return
        index = self._policy.choose(job)
        self._sent += 1
        call = self._replicas[index].submit(self._sent, job, now)
        self._policy.sent(index, call)
        self._calls.append(call)
        if turns:
            self._following[self._sent] = lambda then: self._turn(then, list(turns))
        if self._replicas[index].idle:
            self._begin(index, now)

    def _begin(self, index: int, now: float) -> None:
        ends = self._replicas[index].begin(now)
        if ends is not None:
            self._add(ends, lambda then: self._end(index, then))

    def _end(self, index: int, now: float) -> None:
        done = self._replicas[index].end(now)
        for call in done.first:
            self._policy.computed(index, call)
        for call in done.ended:
            self._policy.ended(index, call)
            following = self._following.pop(call.request.key, None)
            if following is not None:
                following(now)
        self._begin(index, now)

    def _outcome(self, start: float, end: float) -> Outcome:
        calls = [call for call in self._calls if call.arrived >= start]
        counts, seconds = self._counts, end - start
        computed = np.array([count.computed for count in counts], dtype=float)
        busy = np.array([count.busy for count in counts])
        held = sum(count.held / replica.slots for count, replica in zip(counts, self._replicas, strict=True))
        return Outcome(
            cached=sum(call.request.cached for call in calls) / sum(len(call.job.prompt) for call in calls),
            waits=np.array([call.started - call.arrived for call in calls]),
            firsts=np.array([call.first - call.arrived for call in calls]),
            busy=float(busy.mean() / seconds),
            busiest=float(busy.max() / seconds),
            pool=float(held / busy.sum()),
            imbalance=float(computed.max() / computed.mean()),
            retracted=sum(count.retracted for count in counts),
            rate=len(calls) / seconds,
            output_rate=sum(len(call.job.output) for call in calls) / seconds,
            routing=self._policy.seconds / self._sent,
        )
