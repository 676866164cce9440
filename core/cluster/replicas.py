"""``Replicas``: which replicas of a model there are, and which of them get requests."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from msgspec import structs

from trunkline.core.client.replies import engine_down
from trunkline.core.engine.messages import Abort, Answer, Call, Heartbeat, Progress, Ready, Started

from .files import send_file
from .handle import Handle
from .link import Link, Result
from .messages import Failure, NeedFile, State
from .renewal import Renewal
from .routing import PrefixRouting

log = logging.getLogger("trunkline.cluster")

AGAIN = 1.0  # seconds after which a connection that has broken is opened again
DRAIN_TICK = 0.1  # seconds between looks at whether a replica that drains has finished

Outcome = Answer | Failure


@dataclass(frozen=True, slots=True)
class Asked:
    """A call that runs at a replica."""

    link: Link
    call: Call
    answer: asyncio.Future[Outcome]


class Replicas:
    """Follows the replicas of a model.

    * ``links``: the connections to the replicas that Ray lists.
    * ``broken``: how many connections have broken.
    * ``keys``: of all that is sent to replicas.
    """

    def __init__(
        self,
        handle: Handle,
        receive: Callable[[Link, Started | Progress | Failure], None],
        lost: Callable[[Link], None],
        busy: Callable[[Link], bool],
        changed: Callable[[Link], None],
    ) -> None:
        """``receive`` gets messages about requests. ``lost`` is called with a replica whose connection has broken, and
        ``changed`` when one has come, gone, or has another state. ``busy``: whether it runs requests of this front."""
        self.links: dict[str, Link] = {}
        self.broken = 0
        self.keys = itertools.count(1)
        self.routing = PrefixRouting()
        self._handle = handle
        self._receive_request, self._lost, self._busy, self._changed = receive, lost, busy, changed
        self._listed: Sequence[str] = ()
        self._known: dict[Link, State] = {}  # of those in ``links`` that are ready
        self._renewal = Renewal(self.links, self.ask)
        self._asked: dict[int, Asked] = {}  # the calls that run, by key
        self._draining: set[Link] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Begin to follow them."""
        loop = asyncio.get_running_loop()

        def changed(names: Sequence[str]) -> None:
            loop.call_soon_threadsafe(self._follow, list(names))

        self._handle.watch(changed)

    async def stop(self) -> None:
        """End all connections: the replicas abort what they still run for this front."""
        self._handle.watch(lambda names: None)
        links = list(self.links.values())
        self.links.clear()
        for task in self._tasks:
            task.cancel()
        await self._renewal.stop()
        await asyncio.gather(*self._tasks, *(link.close() for link in links), return_exceptions=True)

    @property
    def ready(self) -> Ready | None:
        """What a replica that gets requests said last; None until one is ready."""
        return self._renewal.ready

    @property
    def names(self) -> list[str]:
        """Those whose engine is up, whatever weights it has."""
        return [link.name for link in self.links.values() if link.up]

    def find(self, name: str) -> Link | None:
        """A replica that is listed or drains."""
        draining = (link for link in self._draining if link.name == name)
        return self.links.get(name) or next(draining, None)

    @property
    def up(self) -> list[Link]:
        """Those that get requests: healthy ones, or if there are none, all whose engine is up."""
        served = [link for link in self.links.values() if link.up and self._renewal.is_current(link)]
        return [link for link in served if link.healthy] or served

    async def ask(self, link: Link, message: Call) -> Outcome:
        """A replica's answer to a call."""
        call = structs.replace(message, key=next(self.keys))
        answer: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self._asked[call.key] = Asked(link, call, answer)
        try:
            link.send(call)
            outcome = await answer
            if call.control == "flush_cache" and link in self._known and isinstance(outcome, Answer) and outcome.value:
                self.routing.flush(link.name)
            return structs.replace(outcome, key=message.key) if isinstance(outcome, Answer) else outcome
        except asyncio.CancelledError:
            link.send(Abort(call.key))
            raise
        finally:
            del self._asked[call.key]

    # -- which ones there are ----------------------------------------------------------------

    def _follow(self, names: Sequence[str]) -> None:
        """Ray lists these. One that is gone from the list may still run requests: it drains."""
        self._listed = names
        for name in names:
            if name not in self.links:
                self.links[name] = Link(name, self._handle, self._receive, self._update)
        for name in set(self.links).difference(names):
            self._renewal.forget(name)
            self._retire(self.links[name])

    def _receive(self, link: Link, message: Result) -> None:
        if isinstance(message, Answer):
            self._answer([message.key], message)
            return
        if isinstance(message, NeedFile):
            if message.key in self._asked:
                self._start(self._send_file(self._asked[message.key]))
            return
        if isinstance(message, Failure):
            self._answer(message.keys, message)
        self._receive_request(link, message)

    def _answer(self, keys: Sequence[int], outcome: Outcome) -> None:
        for key in keys:
            if key not in self._asked or (answer := self._asked[key].answer).done():
                continue
            if isinstance(outcome, Failure):
                answer.set_result(structs.replace(outcome, running=[key] if key in outcome.running else []))
            else:
                answer.set_result(outcome)

    async def _send_file(self, asked: Asked) -> None:
        try:
            await send_file(asked.link, asked.call, asked.answer)
        except OSError as error:
            log.error("a file can't be sent to replica %s: %s", asked.link.name, error)
            asked.link.send(Abort(asked.call.key))
            self._answer([asked.call.key], Failure([], f"The file can't be read: {error.strerror}."))

    def _update(self, link: Link, message: State | Heartbeat | None) -> None:
        """A replica has a new state or heartbeat; None: its connection has broken."""
        if message is None:
            self.broken += link.ready is not None
            self._retire(link)
            self._fail_calls(link)
            self._lost(link)
            self._start(self._open_again())
        elif self.links.get(link.name) is link:
            if isinstance(message, Heartbeat):
                if link in self._known:
                    for load in message.loads:
                        self.routing.observe(link.name, load)
                    if self._renewal.renew(link):
                        self._changed(link)
                return
            if message.ready is not None:
                self._observe(link, message, message.ready)
            self._changed(link)

    def _observe(self, link: Link, state: State, ready: Ready) -> None:
        """What a replica serves, or something else of its state, has changed."""
        before = self._known.get(link)
        self._known[link] = state
        if before is None:
            self.routing.add(link.name, ready.models[0].max_total_tokens)
        elif (before.restarts, _number(before)) != (state.restarts, _number(state)):
            self.routing.flush(link.name)
        self._renewal.observe(link, ready)

    async def _open_again(self) -> None:
        await asyncio.sleep(AGAIN)
        self._follow(self._listed)

    def _retire(self, link: Link) -> None:
        """Send nothing more to a replica, and close its connection when nothing of it is awaited."""
        if self.links.get(link.name) is not link:
            return
        del self.links[link.name]
        if self._known.pop(link, None) is not None:
            self.routing.remove(link.name)
        self._renewal.lose(link)
        self._start(self._drain(link))
        self._changed(link)

    async def _drain(self, link: Link) -> None:
        self._draining.add(link)
        try:
            while not link.broken and (self._busy(link) or any(one.link is link for one in self._asked.values())):
                await asyncio.sleep(DRAIN_TICK)
        finally:
            self._draining.discard(link)
            await link.close()
            self._fail_calls(link)

    def _fail_calls(self, link: Link) -> None:
        """A replica that is gone won't answer."""
        asked = [key for key, one in self._asked.items() if one.link is link]
        self._answer(asked, Failure(asked, reason_of(link)))

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def reason_of(link: Link) -> str:
    """What clients are told whose requests were lost with a replica."""
    return engine_down(f"replica {link.name}: {link.broken or 'it was removed'}").message


def _number(state: State) -> int:
    return 0 if state.ready is None else state.ready.models[0].update_number
