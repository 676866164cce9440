"""``Group``: a front's requests and calls at the replicas of one model."""

from __future__ import annotations

import asyncio
import logging
import os
from array import array
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field

from msgspec import structs

from trunkline.core.client.transport import Deliver, Down
from trunkline.core.engine.messages import ABORTED, Abort, Answer, Call, Progress, Started, Submit
from trunkline.core.errors import EngineDown
from trunkline.core.types import on_replica

from .handle import Handle
from .link import Link
from .messages import Failure
from .replicas import Replicas, reason_of
from .routing import Prompt, Sent

log = logging.getLogger("trunkline.cluster")

NONE_UP = "No replica is up; try again soon."
MAX_LOST = 2  # a request that ran at this many replicas which were lost isn't sent again: it may be the cause


@dataclass(slots=True, eq=False)
class Job:
    """A request of the front.

    ``tried``: the replicas that didn't end it; ``lost``: how many of them ran it and were lost themselves. The others
    are of the present attempt: ``key`` of its messages; ``link``, the replica; ``begun``: it has left the queue there.
    """

    message: Submit
    prompt: Prompt
    tried: set[str] = field(default_factory=set)
    lost: int = 0
    started: bool = False
    key: int = 0
    link: Link | None = None
    begun: bool = False
    sent: Sent | None = None
    output: array[int] | None = None  # None: no result has arrived


class Group:
    """Sends requests and calls to the replicas of a model.

    A request that is lost with its replica is sent to another one, unless results of it were delivered, or it was
    in the pass that the engine didn't survive. Must be used from a single event loop.
    """

    def __init__(
        self, handle: Handle, deliver: Deliver, down: Down, changed: Callable[[Collection[int]], None]
    ) -> None:
        """``changed`` is called when a replica has come, gone or has another state, with the keys of the requests that
        run there."""
        self.replicas = Replicas(
            handle,
            self._receive,
            self._lose,
            lambda link: any(job.link is link for job in self._jobs.values()),
            lambda link: changed([job.message.key for job in self._jobs_at(link)]),
        )
        self._deliver, self._down = deliver, down
        self._attempts: dict[int, Job] = {}
        self._jobs: dict[int, Job] = {}
        self._calls: set[asyncio.Task[None]] = set()

    async def stop(self) -> None:
        """End all requests and calls, and let go of the replicas."""
        for task in self._calls:
            task.cancel()
        await asyncio.gather(*self._calls, self.replicas.stop(), return_exceptions=True)

    # -- messages of the front ---------------------------------------------------------------

    def write(self, message: Submit | Abort | Call) -> None:
        """Send a message. A failure is told by ``down``."""
        if isinstance(message, Submit):
            # Vectors in place of ids, and what isn't cached, share no prefix with anything.
            shares = message.cacheable and not message.embeds
            job = Job(message, Prompt.of(message.prompt, message.salt if shares else os.urandom(8)))
            self._jobs[message.key] = job
            if not self._send(job):
                asyncio.get_running_loop().call_soon(self._refuse, job)
        elif isinstance(message, Abort):
            if (aborted := self._jobs.get(message.key)) is not None:
                if aborted.link is not None:
                    aborted.link.send(Abort(aborted.key))
                self._forget(aborted)
                self._deliver(Progress(message.key, [], finish=ABORTED))
        else:
            task = asyncio.create_task(self._call(message))
            self._calls.add(task)
            task.add_done_callback(self._calls.discard)

    def _send(self, job: Job) -> bool:
        """Send a request to the best replica that hasn't tried it. False if there is none."""
        up = {link.name: link for link in self.replicas.up if link.name not in job.tried}
        name = next((name for name in self.replicas.routing.choose(job.prompt) if name in up), None) if up else None
        if name is None:
            return False
        job.link, job.begun, job.key = up[name], False, next(self.replicas.keys)
        job.sent = self.replicas.routing.sent(name, job.prompt)
        self._attempts[job.key] = job
        job.link.send(structs.replace(job.message, key=job.key))
        return True

    def _refuse(self, job: Job) -> None:
        if job.message.key in self._jobs:  # else it was aborted
            self._forget(job)
            self._down(EngineDown(NONE_UP), [], [job.message.key])

    async def _call(self, message: Call) -> None:
        name = message.replica or next((link.name for link in self.replicas.up), "")
        link = self.replicas.find(name)
        if link is None:
            answer: Answer | Failure = Failure([], f"The replica {name} is gone." if name else NONE_UP)
        else:
            answer = await self.replicas.ask(link, message)
        if isinstance(answer, Answer):
            self._deliver(answer)
        else:
            self._down(EngineDown(answer.message), [message.key] if answer.running else [], [message.key])

    # -- messages of replicas ----------------------------------------------------------------

    def _receive(self, link: Link, message: Started | Progress | Failure) -> None:
        if isinstance(message, Failure):
            jobs = [self._attempts[key] for key in message.keys if key in self._attempts]
            running = set(message.running)
            self._lost(jobs, message.message, {job for job in jobs if job.key in running})
            return
        job = self._attempts.get(message.key)
        if job is None:
            return  # it was aborted
        message.key = job.message.key
        job.begun = True
        if isinstance(message, Started):
            if not job.started:  # else it was lost and runs again
                job.started = True
                with on_replica(link.name):  # the label of its weights is this replica's
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

    def _lose(self, link: Link) -> None:
        """The connection to a replica has broken."""
        jobs = self._jobs_at(link)
        for job in jobs:
            job.lost += job.begun
        self._lost(jobs, reason_of(link), {job for job in jobs if job.lost >= MAX_LOST})

    def _lost(self, jobs: Iterable[Job], reason: str, suspects: set[Job]) -> None:
        """Replicas haven't ended requests: send them to other ones, where that may be. ``suspects``: the request may
        be the cause."""
        ended = []
        for job in jobs:
            if job.link is not None:
                job.tried.add(job.link.name)
            self._leave(job)
            if job in suspects or job.output is not None or not self._send(job):
                del self._jobs[job.message.key]
                ended.append(job.message.key)
            else:
                log.info("request %s was lost (%s), and is sent to another replica", job.message.rid, reason)
        if ended:
            self._down(EngineDown(reason), [job.message.key for job in suspects], ended)

    def _jobs_at(self, link: Link) -> list[Job]:
        """The requests that a replica has."""
        return [job for job in self._jobs.values() if job.link is link]

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
