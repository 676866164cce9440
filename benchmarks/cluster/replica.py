"""A replica without a model: the real scheduler with its prefix cache, and a model of how long passes take."""

from __future__ import annotations

from dataclasses import dataclass, field

from cluster.traffic import Ids, Job
from trunkline.core.cache.pool import SlotPool, SlotTable
from trunkline.core.cache.radix import RadixCache
from trunkline.core.engine.messages import Load
from trunkline.core.engine.scheduling.batch import Batch
from trunkline.core.engine.scheduling.pace import Pace
from trunkline.core.engine.scheduling.scheduler import Scheduler
from trunkline.core.types import Needs, Request


@dataclass(frozen=True)
class Cost:
    """Seconds of a pass: ``fixed + per_token * tokens + per_decode * decoding rows``.

    The defaults are those of SmolLM2-135M in bfloat16 on two cores (benchmarks/results/latency-2026-11-29.md).
    """

    fixed: float = 0.0122
    per_token: float = 0.00069
    per_decode: float = 0.00008

    def seconds(self, batch: Batch, speed: float) -> float:
        """The time of a pass on a replica that is ``speed`` times as fast."""
        return (self.fixed + self.per_token * batch.tokens + self.per_decode * batch.decodes) / speed


@dataclass(frozen=True)
class Size:
    """Settings of a replica: slots of its KV pool, tokens of a pass, requests that run at the same time, and the limit
    on the tokens of a request."""

    slots: int = 65_536
    chunk: int = 1024
    running: int = 64
    longest: int = 8192


@dataclass(eq=False)
class Call:
    """A request at a replica, and when it arrived, was scheduled, and had its first token; seconds."""

    job: Job
    request: Request
    arrived: float
    started: float = -1.0
    first: float = -1.0


@dataclass
class Counts:
    """What a replica has done."""

    busy: float = 0.0  # seconds of passes
    held: float = 0.0  # the sum over passes of their seconds times the slots that requests hold
    retracted: int = 0
    computed: int = 0  # tokens of prompts, those of retracted requests included


@dataclass
class Pass:
    """What ends with a pass."""

    first: list[Call] = field(default_factory=list)  # have their first token
    ended: list[Call] = field(default_factory=list)


class Replica:
    """Computes one pass after another; its clock is its caller's. ``scale``: how many replicas it stands for."""

    def __init__(self, name: str, size: Size, cost: Cost, *, scale: int = 1) -> None:
        self.name, self.slots = name, size.slots * scale
        self._cost, self._scale = cost, scale
        running = size.running * scale
        self._pace = Pace()
        self._scheduler = Scheduler(
            SlotPool(self.slots),
            SlotTable(running, size.longest),
            RadixCache(),
            chunk=size.chunk * scale,
            max_running=running,
            policy="lpm",
            pace=self._pace,
        )
        self._calls: dict[int, Call] = {}
        self._batch: Batch | None = None
        self.counts = Counts()
        self._seconds = 0.0

    @property
    def idle(self) -> bool:
        """Whether no pass runs."""
        return self._batch is None

    def load(self) -> Load:
        """As in a heartbeat."""
        scheduler = self._scheduler
        free = scheduler.free_slots()
        return Load("", scheduler.waiting, scheduler.running, scheduler.queue.retracted, free, self.slots)

    def submit(self, key: int, job: Job, now: float) -> Call:
        """Queue a request."""
        prompt = job.prompt.tolist()
        request = Request(key, "", "", None, prompt, len(prompt), Needs(new_tokens=len(job.output)))
        call = self._calls[key] = Call(job, request, now)
        self._scheduler.add(request)
        return call

    def begin(self, now: float) -> float | None:
        """Begin a pass; the time when it ends. None if nothing waits or runs."""
        batch = self._batch = self._scheduler.plan()
        if batch is None:
            return None
        for request in batch.started:
            self._calls[request.key].started = now
        self.counts.retracted += len(batch.retracted)
        self._seconds = self._cost.seconds(batch, self._scale)
        self.counts.busy += self._seconds
        self.counts.held += self._seconds * (self.slots - self._scheduler.free_slots())
        return now + self._seconds

    def end(self, now: float) -> Pass:
        """The pass has ended at ``now``."""
        batch, done = self._batch, Pass()
        assert batch is not None
        self._batch = None
        prompts = batch.tokens - batch.decodes
        self.counts.computed += prompts
        self._scheduler.commit(batch)
        self._pace.observe(batch.decodes, prompts, self._seconds)
        for row in batch.rows:
            if not row.final:
                continue
            call = self._calls[row.request.key]
            request, output = row.request, call.job.output
            request.tokens.append(int(output[request.output_len]))
            if call.first < 0:
                call.first = now
                done.first.append(call)
            if request.output_len == len(output):
                self._scheduler.finish(request)
                del self._calls[request.key]
                done.ended.append(call)
        return done


def ids_of(array: Ids) -> bytes:
    """Token ids as a front has them: int32 little-endian."""
    return array.astype("<i4").tobytes()
