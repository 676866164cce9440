"""The engine process as the front sees it: started, watched, replaced when it dies or hangs.

Signs of life: the engine beats every second from a thread of its own, and each beat tells the age
of the running pass. Silence means a stopped or dying process, an old pass means a hang.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, cast

from msgspec import Struct, structs, to_builtins

from ..engine.messages import (
    MAX_FRAME,
    Beat,
    Changed,
    EngineMessage,
    Failed,
    Loading,
    Ready,
    Stop,
    engine_decoder,
    frame,
)
from ..errors import ModelError

log = logging.getLogger("trunkline.supervisor")

COMMAND = (sys.executable, "-m", "trunkline.core.engine.process")
STOP_SECONDS = 5.0  # for an engine that was told to stop
LEAVE_SECONDS = 1.0  # for one that closed its socket
# How long OpenMP threads spin for each other: some microseconds bridge the barriers of a decode pass
# (asleep at each, it takes half as long again); longer only takes the cores from others.
SPIN = {"GOMP_SPINCOUNT": "1000"}
# What glibc keeps of freed memory: a pass's buffers. Taken anew page by page they can cost an eighth of it.
KEEP = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(256 << 20)}


class Patience(Struct, frozen=True):
    """When to lose it. All in seconds but ``crashes``."""

    unhealthy: float = 10.0  # silence after which health checks fail
    silent: float = 30.0  # silence after which the engine is replaced
    one_pass: float = 300.0  # age of a pass that counts as a hang
    starting: float = 1200.0  # silence while models are loaded
    crashes: int = 5  # so many within ``window`` end the server
    window: float = 300.0
    tick: float = 0.5


class EngineProcess(asyncio.Protocol):
    """One run of the engine: the child and the socket to it."""

    def __init__(self, deliver: Callable[[list[EngineMessage]], None]) -> None:
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._deliver = deliver
        self._buffer = bytearray()
        self._child: subprocess.Popen[bytes] | None = None
        self._transport: asyncio.Transport | None = None

    @classmethod
    async def spawn(
        cls, command: Sequence[str], first: Any, deliver: Callable[[list[EngineMessage]], None]
    ) -> EngineProcess:
        """Start ``command FD`` and send ``first`` as the first frame. The child has a process group
        of its own, so that Ctrl-C reaches the front alone, which then drains."""
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        process = cls(deliver)
        with theirs:
            process._child = subprocess.Popen(
                [*command, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env={**KEEP, **({} if "OMP_WAIT_POLICY" in os.environ else SPIN), **os.environ},
                stdin=subprocess.DEVNULL,
                process_group=0,
            )
        await asyncio.get_running_loop().create_unix_connection(lambda: process, sock=ours)
        process.write(frame(first))
        return process

    @property
    def pid(self) -> int:
        return self._child.pid if self._child else 0

    def write(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)

    async def end(self, grace: float) -> int:
        """Wait ``grace`` seconds for the child to leave, then kill it; its exit status."""
        assert self._child is not None
        deadline = time.monotonic() + grace
        while self._child.poll() is None and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        self._child.kill()
        status = await asyncio.to_thread(self._child.wait)
        if self._transport is not None:
            self._transport.abort()
        return status

    # -- asyncio.Protocol --------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but its class

    def data_received(self, data: bytes) -> None:
        buffer = self._buffer
        buffer += data
        start = 0
        while len(buffer) - start >= 4:
            length = int.from_bytes(buffer[start : start + 4], "little")
            if length > MAX_FRAME:
                self._lose("it sent a broken frame")
                return
            if len(buffer) - start < 4 + length:
                break
            # A copy: raw results keep pointing into what they were decoded from.
            body = bytes(buffer[start + 4 : start + 4 + length])
            start += 4 + length
            self._handle(body)
        del buffer[:start]

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self._lose("it died")

    def _handle(self, body: bytes) -> None:
        try:
            self._deliver(engine_decoder.decode(body))
        except Exception:
            log.exception("a frame from the engine could not be handled")
            self._lose("it sent a frame that makes no sense")

    def _lose(self, reason: str) -> None:
        if not self.lost.done():
            self.lost.set_result(reason)


class Supervisor:
    """Keeps an engine running. ``deliver`` gets its messages, ``down`` is called when one is lost."""

    def __init__(
        self,
        config: dict[str, Any],
        deliver: Callable[[EngineMessage], None],
        down: Callable[[str], None],
        *,
        command: Sequence[str] = COMMAND,
        patience: Patience | None = None,
    ) -> None:
        self.ready: Ready | None = None  # the last engine's word, kept while it is replaced
        self.up = False  # an engine is there and takes requests
        self.restarts = 0
        self.beat = Beat(0, 0.0)
        self.ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._config = config
        self._deliver = deliver
        self._down = down
        self._command = command
        self._patience = patience or Patience()
        self._process: EngineProcess | None = None
        self._silence = 0.0
        self._excused: int | None = None  # a pass that announced that it takes long
        self._failure: str | None = None
        self._crashes: deque[float] = deque()
        self._first: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._task: asyncio.Task[None] | None = None

    @property
    def healthy(self) -> bool:
        """An engine is up and was heard of lately."""
        return self.up and self._silence < self._patience.unhealthy

    @property
    def pid(self) -> int:
        return self._process.pid if self._process else 0

    async def start(self) -> None:
        """Return when the engine is ready. ModelError with its reason when it can't be."""
        self._task = asyncio.create_task(self._run(), name="engine supervisor")
        await self._first

    async def stop(self) -> None:
        """End the engine: politely if it listens, else not."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    def write(self, messages: list[Any]) -> None:
        """Send messages to the engine; lost when there is none."""
        if self._process is not None and messages:
            self._process.write(frame(messages))

    # -- one engine after another ------------------------------------------------------------

    async def _run(self) -> None:
        while True:
            reason = await self._one_run()
            if not self._first.done():
                self._first.set_exception(ModelError(reason))
                return
            if self._is_loop():
                self.ended.set_result(
                    f"The engine failed {self._patience.crashes} times within {self._patience.window:g} s, "
                    f"the last time because {reason}."
                )
                return
            self.restarts += 1
            log.error("engine lost: %s; starting it again (restart %d)", reason, self.restarts)
            await asyncio.sleep(min(0.5 * (len(self._crashes) - 1), 2.0))

    async def _one_run(self) -> str:
        """Run an engine to its end; why it ended."""
        self._silence, self._excused, self._failure, self.beat = 0.0, None, None, Beat(0, 0.0)
        try:
            process = await EngineProcess.spawn(self._command, {"config": self._config}, self._receive)
        except OSError as error:
            return f"it could not be started: {error}"
        self._process = process
        try:
            reason = await self._watch(process)
            self.up, self._process = False, None
            self._down(reason)  # before anything is waited for: clients are waiting already
            status = await process.end(LEAVE_SECONDS if process.lost.done() else 0.0)
            return self._failure or f"{reason} (exit status {status})"
        except asyncio.CancelledError:
            process.write(frame([Stop()]))
            await process.end(STOP_SECONDS if self.up else 0.0)
            raise
        finally:
            self.up, self._process = False, None

    async def _watch(self, process: EngineProcess) -> str:
        """Return the reason when the process is lost or must be replaced."""
        tick = self._patience.tick
        while True:
            done, _ = await asyncio.wait({process.lost}, timeout=tick)
            if done:
                return self._failure or process.lost.result()
            # Silence is counted in our own ticks: time in which the front itself was stopped
            # says nothing about the engine.
            self._silence += tick
            hang = self._complaint()
            if hang is not None:
                return hang

    def _complaint(self) -> str | None:
        patience = self._patience
        limit = patience.silent if self.up else patience.starting
        if self._silence > limit:
            return f"it was silent for {limit:g} s"
        if self.beat.age > patience.one_pass and self.beat.passes != self._excused:
            return f"one pass took longer than {patience.one_pass:g} s"
        return None

    def _is_loop(self) -> bool:
        now = time.monotonic()
        self._crashes.append(now)
        while now - self._crashes[0] > self._patience.window:
            self._crashes.popleft()
        return len(self._crashes) >= self._patience.crashes

    # -- messages ----------------------------------------------------------------------------

    def _receive(self, messages: list[EngineMessage]) -> None:
        self._silence = 0.0
        for message in messages:
            if isinstance(message, Beat):
                self.beat = message
            elif isinstance(message, Ready):
                self.ready, self.up = message, True
                if not self._first.done():
                    self._first.set_result(None)
            elif isinstance(message, Changed):
                self._change(message)
            elif isinstance(message, Loading):
                self._excused = self.beat.passes
                log.info("engine: %s", message.what)
            elif isinstance(message, Failed):
                self._failure = message.message
            else:
                self._deliver(message)

    def _change(self, message: Changed) -> None:
        """From now on, and after a restart, other weights are served."""
        if self.ready is not None:
            plan = [{**row, "model": one.name} for row, one in zip(self.ready.plan, message.models, strict=True)]
            self.ready = structs.replace(self.ready, models=message.models, plan=plan)
        self._config = {**self._config, "models": to_builtins(message.settings)}
        self._deliver(message)
