"""``Link``: a front's connection to one replica, and the last state that it gave."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from trunkline.core.engine.messages import Answer, Heartbeat, Progress, Ready, Started
from trunkline.core.errors import describe_error

from .connection import Connection
from .handle import Attachment, Handle
from .messages import Failure, Hello, NeedFile, State, ToFront, decode_address, decode_for_front

log = logging.getLogger("trunkline.cluster")

SILENT = 10.0  # seconds without a message after which a replica counts as unhealthy; heartbeats come once a second
LOST = 30.0  # and after which it counts as lost: its machine, or the process that forwards messages, may be stopped
TICK = 1.0  # seconds between looks at that
CONNECT_SECONDS = 10.0

Result = Started | Progress | Answer | Failure | NeedFile


class Link:
    """Connects to a replica, and reads what it sends until the connection breaks or :meth:`close`."""

    def __init__(
        self,
        name: str,
        handle: Handle,
        receive: Callable[[Link, Result], None],
        changed: Callable[[Link, State | Heartbeat | None], None],
    ) -> None:
        """``receive`` gets messages about requests and calls. ``changed`` is called after all others, and with None
        when the connection has broken."""
        self.name = name
        self.state = State(up=False, healthy=False, restarts=0, ready=None)
        self.beat = Heartbeat(0.0)
        self.broken = ""  # why the connection has ended
        self._silence = 0.0  # seconds, by this loop's own ticks: while the front is stopped, it can't read
        self._receive = receive
        self._changed = changed
        self._connection: Connection | None = None
        self._task = asyncio.create_task(self._run(handle), name=f"connection to {name}")

    @property
    def ready(self) -> Ready | None:
        """What it serves."""
        return self.state.ready

    @property
    def up(self) -> bool:
        """Whether its engine runs."""
        return self.state.up and not self.broken

    @property
    def healthy(self) -> bool:
        """Whether its engine runs and makes progress."""
        return self.up and self.state.healthy and self._silence < SILENT

    def send(self, message: Any) -> None:
        """Send a message; dropped while there is no connection."""
        if self._connection is not None:
            self._connection.send(message)

    async def drained(self) -> None:
        """Return when little of what was sent is in memory."""
        if self._connection is not None:
            await self._connection.drained()

    async def close(self) -> None:
        """End the connection; the replica then aborts what it still runs for this front."""
        self._task.cancel()
        await asyncio.wait({self._task})

    async def _run(self, handle: Handle) -> None:
        try:
            async with handle.attach(self.name) as attachment:
                try:
                    self._end(await self._connect(attachment))
                except Exception as error:  # of what carries the call, or of the connection
                    self._end(error)
                # Ending the call may take long if its actor has died; `close` doesn't wait for that.
        except Exception as error:
            self._end(error)

    def _end(self, reason: str | Exception) -> None:
        """The connection has broken, or couldn't be made. Only the first reason counts."""
        if self.broken:
            return
        self.broken = reason if isinstance(reason, str) else describe_error(reason).splitlines()[0]
        log.warning("the connection to replica %s has ended: %s", self.name, self.broken)
        try:
            self._changed(self, None)
        except Exception:
            log.exception("the end of the connection to replica %s could not be handled", self.name)

    async def _connect(self, attachment: Attachment) -> str:
        """Returns the reason when the connection has ended."""
        address = decode_address(attachment.address)
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(CONNECT_SECONDS):
            _, connection = await loop.create_connection(
                lambda: Connection(decode_for_front, self._apply), address.host, address.port
            )
        connection.send(Hello(address.ticket))
        self._connection, self._silence = connection, 0.0
        try:
            while self._silence < LOST:
                await asyncio.wait({connection.lost, attachment.ended}, timeout=TICK, return_when="FIRST_COMPLETED")
                if connection.lost.done():
                    return connection.lost.result()
                if attachment.ended.done():
                    attachment.ended.result()  # perhaps an error, which says more
                    return "it has ended the connection"
                self._silence += TICK
            connection.abort()  # it wouldn't read the rest
            return f"it was silent for {LOST:g} s"
        finally:
            connection.close()

    def _apply(self, messages: list[ToFront]) -> None:
        self._silence = 0.0
        for message in messages:
            try:
                if isinstance(message, State):
                    self.state = message
                    self._changed(self, message)
                elif isinstance(message, Heartbeat):
                    self.beat = message
                    self._changed(self, message)
                else:
                    self._receive(self, message)
            except Exception:  # a defect here must not end what other requests get from the replica
                log.exception("a message of replica %s could not be handled", self.name)
