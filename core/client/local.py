"""The transport to an engine in this process: its loop runs in a thread."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Sequence
from typing import Any

from trunkline.core.config import Config
from trunkline.core.engine.channel import LocalChannel
from trunkline.core.engine.control.update_loader import UpdateLoader
from trunkline.core.engine.loop import EngineLoop
from trunkline.core.engine.messages import EngineMessage, Heartbeat, ModelsChanged, Stop
from trunkline.core.engine.startup import LoadedEngine
from trunkline.core.errors import EngineDown
from trunkline.core.host import Host

from .transport import Deliver, Down

log = logging.getLogger("trunkline.engine")

CLOSED = "The engine is closed."
BROKEN = "The engine broke; its log says why. Make a new one."


class LocalTransport:
    """See :class:`.transport.Transport`. An engine that fails isn't restarted."""

    restarts = 0
    replicated = False
    replicas = ()

    def __init__(self, started: LoadedEngine, config: Config, host: Host, deliver: Deliver, down: Down) -> None:
        """``started``: the engine with the models of ``config``, loaded by :func:`.startup.build`."""
        self.ready = started.ready
        self.up = True
        self.beat = Heartbeat(0.0)
        self._why = CLOSED
        self._deliver = deliver
        self._down = down
        self._clients = asyncio.get_running_loop()  # where deliver and down are called
        self._channel = LocalChannel(self._arrived)
        self.loop = EngineLoop(
            started.lanes,
            self._channel,
            started.controls,
            UpdateLoader(started.lanes, config, host),
            log_interval=config.engine.decode_log_interval,
        )
        self._thread = threading.Thread(target=self._run, name="trunkline-engine", daemon=True)

    @property
    def healthy(self) -> bool:
        return self.up

    async def start(self) -> None:
        self._thread.start()

    async def stop(self) -> None:
        """Return after the running pass."""
        self._channel.post(Stop())
        await self._clients.run_in_executor(None, self._thread.join)

    def replicas_of(self, model: str) -> Sequence[str]:
        return ()

    def write(self, messages: list[Any]) -> None:
        self._channel.post(*messages)

    def unavailable(self) -> EngineDown:
        return EngineDown(self._why)

    def _run(self) -> None:
        try:
            self.loop.run()
        except BaseException:  # a plugin may raise SystemExit
            log.exception("the engine broke")
            self._why = BROKEN
        self._clients.call_soon_threadsafe(self._ended)

    def _ended(self) -> None:
        self.up = False
        self._down(self.unavailable(), [])

    def _arrived(self, messages: list[EngineMessage]) -> None:
        """On the channel's thread."""
        self._clients.call_soon_threadsafe(self._receive, messages)

    def _receive(self, messages: list[EngineMessage]) -> None:
        for message in messages:
            if isinstance(message, Heartbeat):
                self.beat = message
                continue
            if isinstance(message, ModelsChanged):
                self.ready = self.ready.after(message)
            self._deliver(message)
