"""``Group``: a front's requests and calls at the replicas of one model."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
from array import array
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

from msgspec import structs

from trunkline.core.client.transport import Deliver, Down
from trunkline.core.engine.messages import ABORTED, Abort, Answer, Call, Progress, Started, Submit
from trunkline.core.errors import EngineDown

from .handle import Handle
from .link import Link
from .messages import Done, Failure, decode_outcome, encode
from .replicas import Replicas, failed_call, ignore_error, lost_with
from .routing import Prompt, Sent

log = logging.getLogger("trunkline.cluster")

NONE_UP = "No replica is up; try again soon."
MAX_LOST = 2  # a request that ran at this many replicas which were lost isn't sent again: it may be the cause


@dataclass(slots=True, eq=False)
class Job:
    """A request of the front.

    ``tried``: the replicas that didn't end it; ``lost``: how many of them ran it and were lost themselves. The others
    are of the present attempt: ``key`` of its messages; ``link``, the replica that runs it, when that is known;
    ``over``, how it ended: None with its last message.
    """

    message: Submit
    prompt: Prompt
    over: asyncio.Future[Failure | None]
    tried: set[str] = field(default_factory=set)
    lost: int = 0
    started: bool = False
    key: int = 0
    link: Link | None = None
    sent: Sent | None = None
    output: array[int] | None = None  # None: no result has arrived
    task: asyncio.Task[None] | None = None

    def end(self, failure: Failure | None) -> None:
        if not self.over.done():
            self.over.set_result(failure)


class Group:
    """Sends requests and calls to the replicas of a model.

    A request that is lost with its replica is sent to another one, unless results of it were delivered, or it was
    in the pass that the engine didn't survive. Must be used from a single event loop.
    """

    def __init__(
        self, front: str, handle: Handle, deliver: Deliver, down: Down, changed: Callable[[Collection[int]], None]
    ) -> None:
        """``front``: its name at the replicas. ``changed`` is called when one has come, gone or has another state, with
        the keys of the requests that run there."""
        self.replicas = Replicas(
            front,
            handle,
            self._receive,
            self._lose,
            lambda link: bool(self._jobs_at(link)),
            lambda link: changed([job.message.key for job in self._jobs_at(link)]),
        )
        self._front, self._handle = front, handle
        self._deliver, self._down = deliver, down
        self._keys = itertools.count(1)  # of attempts
        self._attempts: dict[int, Job] = {}
        self._jobs: dict[int, Job] = {}
        self._calls: set[asyncio.Task[None]] = set()

    async def stop(self) -> None:
        """End all requests and calls, and let go of the replicas."""
        tasks = [*self._calls, *(job.task for job in self._jobs.values() if job.task is not None)]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, self.replicas.stop(), return_exceptions=True)

    # -- messages of the front ---------------------------------------------------------------

    def write(self, message: Submit | Abort | Call) -> None:
        """Send a message. A failure is told by ``down``."""
        if isinstance(message, Submit):
            # Vectors in place of ids, and what isn't cached, share no prefix with anything.
            shares = message.cacheable and not message.embeds
            prompt = Prompt.of(message.prompt, message.salt if shares else os.urandom(8))
            job = Job(message, prompt, asyncio.get_running_loop().create_future())
            self._jobs[message.key] = job
            job.task = asyncio.create_task(self._run(job))
        elif isinstance(message, Abort):
            if (aborted := self._jobs.get(message.key)) is not None:
                self._forget(aborted)
                if aborted.task is not None:
                    aborted.task.cancel()
                self._deliver(Progress(message.key, [], finish=ABORTED))
        else:
            task = asyncio.create_task(self._call(message))
            self._calls.add(task)
            task.add_done_callback(self._calls.discard)

    async def _run(self, job: Job) -> None:
        """Send a request, again if it is lost, until its last message has arrived."""
        while True:
            failure = await self._attempt(job)
            if failure is None or job.message.key not in self._jobs:
                return
            job.tried.add(failure.replica or (job.sent.replica.name if job.sent is not None else ""))
            job.lost += failure.silent and job.link is not None
            self._leave(job)
            running = failure.running or job.lost >= MAX_LOST
            if running or job.output is not None or not self._replicas_for(job):
                self._forget(job)
                self._down(EngineDown(failure.message), [job.message.key] if running else [], [job.message.key])
                return
            log.info("request %s was lost (%s), and is sent to another replica", job.message.rid, failure.message)

    def _replicas_for(self, job: Job) -> list[str]:
        """The replicas to which a request may be sent, best first."""
        up = {link.name for link in self.replicas.up} - job.tried
        return [name for name in self.replicas.routing.choose(job.prompt) if name in up]

    async def _attempt(self, job: Job) -> Failure | None:
        """Send a request once: None when its last message has arrived."""
        names = self._replicas_for(job)
        if not names:
            return Failure(NONE_UP)
        job.key, job.over = next(self._keys), asyncio.get_running_loop().create_future()
        job.sent = self.replicas.routing.sent(names[0], job.prompt)
        self._attempts[job.key] = job
        body = encode(structs.replace(job.message, key=job.key))
        call = asyncio.ensure_future(self._handle.submit(names, self._front, body))
        call.add_done_callback(ignore_error)  # which is handled here, unless the last message came first
        ended = False
        try:
            both: set[asyncio.Future[Any]] = {call, job.over}
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            if not job.over.done():
                outcome = decode_outcome(call.result())
                if isinstance(outcome, Failure):
                    return outcome
                self._locate_done(job, outcome)
            failure = await job.over
            ended = failure is None  # the replica ends the call by itself
            return failure
        except Exception as error:  # of what carries the call
            return failed_call(error)
        finally:
            if not ended:
                call.cancel()

    async def _call(self, message: Call) -> None:
        name = message.replica or next((link.name for link in self.replicas.up), "")
        link = self.replicas.links.get(name)
        if link is None:
            answer: Answer | Failure = Failure(f"The replica {name} is gone." if name else NONE_UP)
        else:
            answer = await self.replicas.ask(link, message)
        if isinstance(answer, Answer):
            self._deliver(answer)
        else:
            self._down(EngineDown(answer.message), [message.key] if answer.running else [], [message.key])

    # -- messages of replicas ----------------------------------------------------------------

    def _receive(self, link: Link, message: Started | Progress) -> None:
        job = self._attempts.get(message.key)
        if job is None:
            return  # it was aborted, or is a message of an attempt that was lost
        message.key = job.message.key
        self._locate(job, link)
        if isinstance(message, Started):
            if not job.started:  # else it was lost and runs again
                job.started = True
                self._deliver(message)
            return
        if job.output is None:
            job.output = array("i")
            if job.sent is not None:
                self.replicas.routing.computed(job.sent)
        job.output.extend(message.tokens)
        if message.last:
            self._forget(job)
        self._deliver(message)

    def _locate(self, job: Job, link: Link) -> None:
        """A replica runs a request: perhaps not the first one to which it was offered."""
        if job.link is not link:
            job.link = link
            routing = self.replicas.routing
            if job.sent is not None and job.sent.replica.name != link.name and link.name in self.replicas.names:
                routing.ended(job.sent)
                job.sent = routing.sent(link.name, job.prompt)

    def _locate_done(self, job: Job, done: Done) -> None:
        """The last message of a request is in a stream, if that isn't lost."""
        if job.link is None and not job.over.done():
            link = self.replicas.links.get(done.replica)
            if link is None:
                job.end(Failure(NONE_UP, replica=done.replica))
            else:
                self._locate(job, link)

    def _lose(self, link: Link) -> None:
        """A replica's stream has broken."""
        for job in self._jobs_at(link):
            job.end(lost_with(link))

    def _jobs_at(self, link: Link) -> list[Job]:
        """The requests that a replica runs, or to which they were offered first."""
        return [
            job
            for job in self._jobs.values()
            if job.link is link or (job.link is None and job.sent is not None and job.sent.replica.name == link.name)
        ]

    def _leave(self, job: Job) -> None:
        """An attempt has ended."""
        self._attempts.pop(job.key, None)
        if job.sent is not None:
            self.replicas.routing.ended(job.sent, b"" if job.output is None else job.output.tobytes())
        job.sent = job.link = None

    def _forget(self, job: Job) -> None:
        """A request has ended."""
        del self._jobs[job.message.key]
        self._leave(job)
        job.end(None)
