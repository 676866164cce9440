"""``Link``: a front's stream from one replica, and the last state that it gave."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable

from trunkline.core.engine.messages import Answer, Heartbeat, Progress, Ready, Started
from trunkline.core.errors import describe_error

from .handle import Handle
from .messages import State, Update, decode_updates

log = logging.getLogger("trunkline.cluster")

SILENT = 10.0  # seconds without a message after which a replica counts as unhealthy; heartbeats come once a second


class Link:
    """Reads a replica's stream until it breaks or :meth:`close`."""

    def __init__(
        self,
        name: str,
        front: str,
        handle: Handle,
        receive: Callable[[Link, Started | Progress | Answer], None],
        changed: Callable[[Link, State | Heartbeat | None], None],
    ) -> None:
        """``receive`` gets messages about requests and calls. ``changed`` is called after all others, and with None
        when the stream has broken."""
        self.name = name
        self.state = State(up=False, healthy=False, restarts=0, ready=None)
        self.beat = Heartbeat(0.0)
        self.broken = ""  # why the stream has ended
        self._seen = time.monotonic()
        self._receive = receive
        self._changed = changed
        self._task = asyncio.create_task(self._read(handle, front), name=f"stream of {name}")

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
        return self.up and self.state.healthy and time.monotonic() - self._seen < SILENT

    async def close(self) -> None:
        """End the stream; the replica then aborts what it still runs for this front."""
        self._task.cancel()
        await asyncio.wait({self._task})

    async def _read(self, handle: Handle, front: str) -> None:
        try:
            async with contextlib.aclosing(handle.stream(self.name, front)) as stream:
                async for body in stream:
                    self._seen = time.monotonic()
                    for message in decode_updates(body):
                        self._apply(message)
            self.broken = "it ended its stream"
        except Exception as error:  # of what carries the stream
            self.broken = describe_error(error)
        log.warning("the stream of replica %s has ended: %s", self.name, self.broken)
        self._changed(self, None)

    def _apply(self, message: Update) -> None:
        try:
            if isinstance(message, Started | Progress | Answer):
                self._receive(self, message)
                return
            if isinstance(message, State):
                self.state = message
            else:
                self.beat = message
            self._changed(self, message)
        except Exception:  # a defect here must not end what other requests get from the stream
            log.exception("a message of replica %s could not be handled", self.name)
