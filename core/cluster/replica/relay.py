"""``Relay``: between fronts and the engine."""

from __future__ import annotations

import asyncio
import itertools
import os
import secrets
from collections.abc import AsyncGenerator, Collection, Iterable
from dataclasses import dataclass
from typing import Any

from trunkline.core.client.replies import engine_down
from trunkline.core.client.transport import Connect
from trunkline.core.cluster.files import ReceivedFile, file_of
from trunkline.core.cluster.messages import (
    Address,
    Failure,
    FilePart,
    Hello,
    NeedFile,
    State,
    ToReplica,
    encode_address,
)
from trunkline.core.engine.messages import (
    Abort,
    Answer,
    Call,
    EngineMessage,
    ModelsChanged,
    Progress,
    Started,
    Submit,
)
from trunkline.core.errors import EngineDown

from .front_connection import CONNECT_SECONDS, FrontConnection
from .held import HeldUpdates

# A control that the engine doesn't know: ``prefix`` and ``everything`` as :meth:`.EngineClient.abort`. The answer is
# how many requests it aborts, of all fronts.
ABORT_REQUESTS = "abort_requests"
TICK = 0.2  # seconds between looks at the engine's state and heartbeat
ALIVE_TICKS = 5  # after as many ticks a front gets a message in any case


@dataclass(slots=True)
class Forwarded:
    """A request or call of a front, which knows it by ``key``. ``call``: None for a request, which has a ``rid``."""

    key: int
    front: FrontConnection
    call: Call | None
    rid: str


class Relay:
    """Forwards requests and calls of any number of fronts to one engine, and their results back.

    A front gets an address by :meth:`attach`, and connects there. Must be used from a single event loop.
    """

    def __init__(self, connect: Connect) -> None:
        self.engine = connect(self._deliver, self._down)
        self._host, self._port = "", 0
        self._server: asyncio.Server | None = None
        self._ticker: asyncio.Task[None] | None = None
        self._tickets: dict[bytes, asyncio.Future[FrontConnection]] = {}  # of fronts that haven't connected yet
        self._keys = itertools.count(1)  # the engine's: keys of several fronts may be equal
        self._jobs: dict[int, Forwarded] = {}
        self._fronts: set[FrontConnection] = set()
        self._held = HeldUpdates()

    async def start(self, host: str) -> None:
        """Return when the engine is ready and fronts can connect to ``host``, an address of this machine.

        ModelError when the engine can't start.
        """
        await self.engine.start()
        self._server = await asyncio.get_running_loop().create_server(
            lambda: FrontConnection(self.receive, self.drop), host, 0
        )
        self._host, self._port = self._server.sockets[0].getsockname()[:2]
        self._ticker = asyncio.create_task(self._tick(), name="state of the engine")

    async def stop(self) -> None:
        """End the engine and all connections."""
        if self._ticker is not None and self._server is not None:
            self._ticker.cancel()
            self._server.close()
        await self.engine.stop()
        self._down(engine_down("the replica was stopped"), [])
        for front in list(self._fronts):
            front.close()

    # -- fronts ------------------------------------------------------------------------------

    async def attach(self) -> AsyncGenerator[bytes]:
        """Gives the :class:`Address` for one connection, and ends with it: its end aborts the front's jobs."""
        ticket = secrets.token_bytes(32)
        connected: asyncio.Future[FrontConnection] = asyncio.get_running_loop().create_future()
        self._tickets[ticket] = connected
        try:
            yield encode_address(Address(self._host, self._port, ticket))
            await asyncio.wait({connected}, timeout=CONNECT_SECONDS)
            if connected.done():
                await asyncio.wait({connected.result().lost})
        finally:
            self._tickets.pop(ticket, None)
            if connected.done():
                connected.result().abort()

    def receive(self, front: FrontConnection, messages: list[ToReplica]) -> None:
        """Messages of a front have arrived. ValueError for a wrong ticket."""
        forwarded: list[Any] = []
        for message in messages:
            if isinstance(message, Hello):
                self._accept(front, message)
            elif not front.accepted:
                raise ValueError("a message came before the ticket")
            elif isinstance(message, FilePart):
                forwarded += self._receive_part(front, message)
            elif isinstance(message, Abort):
                forwarded += self._abort(front, message.key)
            elif isinstance(message, Call) and message.control == ABORT_REQUESTS:
                forwarded += self._abort_named(front, message)
            elif not self.engine.up:
                front.send(Failure([message.key], self.engine.unavailable().message))
            elif isinstance(message, Call) and (path := file_of(message)) is not None and not os.access(path, os.R_OK):
                self._ask_for_file(front, message)
            else:
                forwarded.append(self._forward(front, message))
        if forwarded:
            self.engine.write(forwarded)

    def _accept(self, front: FrontConnection, hello: Hello) -> None:
        connected = self._tickets.pop(hello.ticket, None)
        if connected is None:
            raise ValueError("a connection has no valid ticket")
        connected.set_result(front)
        front.accept()
        self._fronts.add(front)
        self._send_state(front)

    def _forward(self, front: FrontConnection, message: Submit | Call) -> Submit | Call:
        """The message for the engine, under a key of its own."""
        if isinstance(message, Call):
            job = Forwarded(message.key, front, message, "")
            self._held.begin(front, message)
        else:
            job = Forwarded(message.key, front, None, message.rid)
        message.key = next(self._keys)
        self._jobs[message.key] = job
        front.keys[job.key] = message.key
        return message

    def _ask_for_file(self, front: FrontConnection, call: Call) -> None:
        """A call names a file that is on the front's machine."""
        try:
            front.files[call.key] = ReceivedFile(call)
            front.send(NeedFile(call.key))
        except OSError as error:
            front.send(_cannot_write(call.key, error))

    def _receive_part(self, front: FrontConnection, part: FilePart) -> list[Submit | Call]:
        """What the engine must be told."""
        file = front.files.get(part.key)
        if file is None:
            return []  # the call has ended
        try:
            call = file.write(part.data)
        except OSError as error:
            front.forget(part.key)
            front.send(_cannot_write(part.key, error))
            return []
        return [] if call is None else [self._forward(front, call)]

    def _abort(self, front: FrontConnection, key: int) -> list[Abort | Call]:
        """What the engine must be told."""
        engine_key = front.forget(key)
        if engine_key is None:
            return []  # it has ended
        job = self._jobs.pop(engine_key)
        return [Abort(engine_key)] if job.call is None else self._cancels(self._held.abandon(job.call))

    def _abort_named(self, front: FrontConnection, call: Call) -> list[Abort]:
        """Answer a call of :data:`ABORT_REQUESTS`. What the engine must be told; it answers the fronts' requests."""
        prefix, everything = call.arguments.get("prefix", ""), call.arguments.get("everything", False)
        requests = [(key, job.rid) for key, job in self._jobs.items() if job.call is None]
        aborts = [Abort(key) for key, rid in requests if everything or (prefix and rid.startswith(prefix))]
        front.send(Answer(call.key, len(aborts)))
        return aborts

    def drop(self, front: FrontConnection) -> None:
        """A front is gone: abort its jobs, and weight updates that it will never commit."""
        self._fronts.discard(front)
        messages = [message for key in front.live for message in self._abort(front, key)]
        self.engine.write(messages + self._cancels(self._held.abandon_all(front)))

    def _cancels(self, held: list[tuple[str, str]]) -> list[Abort | Call]:
        """Cancel updates. The engine handles this after the call that makes it hold one, if that is still to come."""
        return [Call(next(self._keys), "cancel_update", model, {"hold": token}) for token, model in held]

    # -- messages of the engine --------------------------------------------------------------

    def _deliver(self, message: EngineMessage) -> None:
        if isinstance(message, Started | Progress | Answer):
            job = self._jobs.get(message.key)
            if job is None:
                return  # it was aborted
            if not isinstance(message, Started) and (isinstance(message, Answer) or message.last):
                del self._jobs[message.key]
                job.front.forget(job.key)
                if job.call is not None:
                    self._held.end(job.call)
            message.key = job.key
            job.front.send(message)
        elif isinstance(message, ModelsChanged):
            self._send_states()

    def _down(self, error: EngineDown, working_on: Iterable[int], lost: Collection[int] | None = None) -> None:
        """The engine was lost, and all jobs with it: ``lost`` is None."""
        self._send_states()
        self._held.clear()
        running = set(working_on)
        for front in self._fronts:
            if keys := front.live:
                dead = [key for key in keys if front.forget(key) in running]
                front.send(Failure(keys, error.message, dead))
        self._jobs.clear()

    async def _tick(self) -> None:
        for number in itertools.count():
            await asyncio.sleep(TICK)
            self._send_states()
            if number % ALIVE_TICKS == 0:  # while the engine loads, it has no heartbeat
                for front in self._fronts:
                    front.send(self.engine.beat)

    def _send_states(self) -> None:
        for front in self._fronts:
            self._send_state(front)

    def _send_state(self, front: FrontConnection) -> None:
        """Send the engine's state and heartbeat, if they have changed."""
        engine, last = self.engine, front.state
        state = State(engine.up, engine.healthy, engine.restarts, engine.ready)
        if last is None or state.ready is not last.ready or _changes(state) != _changes(last):
            front.state = state
            front.send(state)
        if engine.beat is not front.beat:
            front.beat = engine.beat
            front.send(engine.beat)


def _cannot_write(key: int, error: OSError) -> Answer:
    return Answer(key, error=(500, f"The replica can't write a file: {error.strerror}.", None))


def _changes(state: State) -> tuple[bool, bool, int]:
    return state.up, state.healthy, state.restarts
