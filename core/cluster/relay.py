"""``Relay``: the replica's part between fronts and its engine. Knows no Ray: it takes and gives bytes."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

from trunkline.core.client.replies import engine_down
from trunkline.core.client.transport import Connect
from trunkline.core.engine.channel import Unsent
from trunkline.core.engine.messages import (
    Abort,
    Answer,
    Call,
    EngineMessage,
    Heartbeat,
    ModelsChanged,
    Progress,
    Started,
)
from trunkline.core.errors import EngineDown

from .messages import Done, Failure, State, decode_call, decode_submit, encode

TICK = 0.2  # seconds between looks at the engine's state and heartbeat
NO_STREAM = engine_down("the replica has no stream to this front").message
# Controls with the argument ``hold``, see core/engine/control/updates.py.
END_HOLD = ("commit_update", "cancel_update")
HELD = ("update_weights", "update_weights_from_tensor", *END_HOLD)


@dataclass(slots=True)
class Reader:
    """A front that reads the replica's stream, and what it hasn't been sent yet. ``state``, ``beat``: the last sent."""

    unsent: Unsent = field(default_factory=Unsent)
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    state: State | None = None
    beat: Heartbeat | None = None

    def send(self, message: Any) -> None:
        self.unsent.add(message)
        self.arrived.set()


@dataclass(slots=True)
class Forwarded:
    """A request or call of a front, which knows it by ``key``. ``ended``: how it ended."""

    key: int
    front: Reader
    ended: asyncio.Future[Done | Failure] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    def end(self, outcome: Done | Failure) -> None:
        if not self.ended.done():
            self.ended.set_result(outcome)


class Relay:
    """Forwards requests and calls of any number of fronts to one engine.

    Each front reads :meth:`stream`, which has the results of all its requests, so that a pass of the engine is one
    message of Ray. :meth:`submit` and :meth:`call` last as long as their request or call: so Ray counts it, waits for
    it when the replica drains, and cancels it when the front is gone. Must be used from a single event loop.
    """

    def __init__(self, name: str, connect: Connect) -> None:
        """``name``: the replica's."""
        self.engine = connect(self._deliver, self._down)
        self._name = name
        self._keys = itertools.count(1)  # the engine's: keys of several fronts may be equal
        self._jobs: dict[int, Forwarded] = {}
        self._fronts: dict[str, Reader] = {}
        self._held: dict[str, tuple[str, str]] = {}  # weight updates that are held, by token: their front and model

    async def start(self) -> None:
        """Return when the engine is ready. ModelError when it can't start."""
        await self.engine.start()

    async def stop(self) -> None:
        await self.engine.stop()
        self._down(engine_down("the replica was stopped"), [])

    # -- called by fronts --------------------------------------------------------------------

    async def stream(self, name: str) -> AsyncIterator[bytes]:
        """What happens, for the front ``name``: lists of :data:`.messages.Update`. Its end aborts the front's jobs."""
        front = self._fronts[name] = Reader()
        try:
            while True:
                self._send_state(front)
                if front.unsent:
                    yield encode(front.unsent.take())
                front.arrived.clear()
                if not front.unsent:
                    await _set_within(front.arrived, TICK)
        finally:
            if self._fronts.get(name) is front:
                del self._fronts[name]
            self._drop(front, name)

    async def submit(self, name: str, body: bytes) -> bytes:
        """Run a ``Submit``; returns how it ended. Aborts the request when cancelled."""
        return encode(await self._run(name, decode_submit(body)))

    async def call(self, name: str, body: bytes) -> bytes:
        """Run a ``Call``; returns how it ended."""
        message = decode_call(body)
        token = message.arguments.get("hold", "") if message.control in HELD else ""
        if token:
            self._held[token] = name, message.model
        outcome: Done | Failure | None = None
        try:
            outcome = await self._run(name, message)
        finally:
            if token and message.control in END_HOLD:
                self._held.pop(token, None)
            elif token and not isinstance(outcome, Done):  # the front doesn't know that it is held
                self._cancel_update(token)
        return encode(outcome)

    async def _run(self, name: str, message: Any) -> Done | Failure:
        """Send a message to the engine under a key of its own, and wait for its end."""
        front = self._fronts.get(name)
        if front is None:
            return Failure(NO_STREAM, replica=self._name)
        if not self.engine.up:
            return Failure(self.engine.unavailable().message, replica=self._name)
        job = Forwarded(message.key, front)
        key = message.key = next(self._keys)
        self._jobs[key] = job
        self.engine.write([message])
        try:
            return await job.ended
        finally:
            if self._jobs.pop(key, None) is not None and not isinstance(message, Call):  # cancelled
                self.engine.write([Abort(key)])

    # -- messages of the engine --------------------------------------------------------------

    def _deliver(self, message: EngineMessage) -> None:
        if isinstance(message, Started | Progress | Answer):
            ends = not isinstance(message, Started) and (isinstance(message, Answer) or message.last)
            job = self._jobs.pop(message.key, None) if ends else self._jobs.get(message.key)
            if job is None:
                return  # it was cancelled
            message.key = job.key
            job.front.send(message)
            if ends:
                job.end(Done(self._name))
        elif isinstance(message, ModelsChanged):
            for front in self._fronts.values():
                self._send_state(front)

    def _down(self, error: EngineDown, working_on: Iterable[int], lost: Collection[int] | None = None) -> None:
        """The engine was lost, and all jobs with it: ``lost`` is None."""
        for front in self._fronts.values():
            self._send_state(front)
        self._held.clear()
        running = set(working_on)
        jobs, self._jobs = self._jobs, {}
        for key, job in jobs.items():
            job.end(Failure(error.message, key in running, self._name))

    def _send_state(self, front: Reader) -> None:
        """Put the engine's state and heartbeat into the stream, if they have changed."""
        engine, last = self.engine, front.state
        state = State(engine.up, engine.healthy, engine.restarts, engine.ready)
        if last is None or state.ready is not last.ready or _changes(state) != _changes(last):
            front.state = state
            front.send(state)
        if engine.beat is not front.beat:
            front.beat = engine.beat
            front.send(engine.beat)

    def _drop(self, front: Reader, name: str) -> None:
        """Abort the jobs of a front that is gone, and weight updates that it will never commit."""
        for key, job in [(key, job) for key, job in self._jobs.items() if job.front is front]:
            del self._jobs[key]
            self.engine.write([Abort(key)])
            job.end(Failure(NO_STREAM, replica=self._name))
        for token in [token for token, (holder, _) in self._held.items() if holder == name]:
            self._cancel_update(token)

    def _cancel_update(self, token: str) -> None:
        """The engine handles this after the call that makes it hold the update, if that is still to come."""
        _, model = self._held.pop(token, ("", ""))
        self.engine.write([Call(next(self._keys), "cancel_update", model, {"hold": token})])


def _changes(state: State) -> tuple[bool, bool, int]:
    return state.up, state.healthy, state.restarts


async def _set_within(event: asyncio.Event, seconds: float) -> None:
    """Return when the event is set, or after as many seconds."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
