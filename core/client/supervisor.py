"""Starts the engine process, watches it, and starts it again when it dies or hangs.

The engine sends a heartbeat every second from a separate thread, with the age of the running pass. Missing
heartbeats mean that the process is stopped or dying; an old pass means that it hangs.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from trunkline.core.config import Config
from trunkline.core.engine.messages import (
    EngineMessage,
    Failed,
    Heartbeat,
    Loading,
    ModelsChanged,
    Ready,
    Stop,
    frame,
    frames,
)
from trunkline.core.errors import EngineDown, ModelError

from .engine_process import EngineProcess
from .replies import engine_down
from .transport import Deliver, Down

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

log = logging.getLogger("trunkline.supervisor")

COMMAND = (sys.executable, "-m", "trunkline.core.engine.process")
STOP_SECONDS = 5.0  # for an engine that was told to stop
LEAVE_SECONDS = 1.0  # for one that closed its socket


class WatchdogLimits(Struct, frozen=True):
    """Timeouts in seconds, and the number of crashes that ends the server."""

    unhealthy: float = 10.0  # time without a message after which health checks fail
    silent: float = 30.0  # time without a message after which the engine is restarted
    one_pass: float = 300.0  # duration of a pass that counts as a hang; after a third of it health checks fail
    starting: float = 1200.0  # time without a message while models are loaded; duration of a weight update
    crashes: int = 5  # the server ends when the engine crashes this often within ``window``
    window: float = 300.0
    tick: float = 0.5  # interval between checks


class Supervisor:
    """The transport to an engine process, which it keeps running; see :class:`.transport.Transport`."""

    replicated = False
    replicas = ()

    def __init__(
        self,
        config: dict[str, Any],
        deliver: Deliver,
        down: Down,
        *,
        command: Sequence[str] = COMMAND,
        limits: WatchdogLimits | None = None,
    ) -> None:
        self.ready: Ready | None = None  # sent by the latest engine; kept during a restart
        self.up = False  # an engine is there and takes requests
        self.restarts = 0
        self.beat = Heartbeat(0.0)
        self.ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._config = config
        self._deliver = deliver
        self._down = down
        self._command = command
        self._limits = limits or WatchdogLimits()
        self._process: EngineProcess | None = None
        self._loading = LoadingDisplay()
        self._silence = 0.0
        self._failure: str | None = None
        self._crashes: deque[float] = deque()
        self._first: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._task: asyncio.Task[None] | None = None

    @property
    def healthy(self) -> bool:
        """The engine is up, has sent a message recently, and no pass has run for too long."""
        progressing = bool(self.beat.work) or self.beat.age < self._limits.one_pass / 3
        return self.up and self._silence < self._limits.unhealthy and progressing

    async def start(self) -> None:
        """Return when the engine is ready. ModelError with its reason when it can't be."""
        self._task = asyncio.create_task(self._run(), name="engine supervisor")
        await self._first

    async def stop(self) -> None:
        """End the engine: with a Stop message and time to exit if it is up, else at once."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    def replicas_of(self, model: str) -> Sequence[str]:
        return ()

    def write(self, messages: list[Any]) -> None:
        """Send messages to the engine. They are dropped while no engine process runs."""
        if self._process is not None and messages:
            for data in frames(messages):
                self._process.write(data)

    def unavailable(self) -> EngineDown:
        """The error of requests that arrive during a restart."""
        return EngineDown("The engine is being started again; try again soon.")

    # -- restarts ----------------------------------------------------------------------------

    async def _run(self) -> None:
        while True:
            reason = await self._one_run()
            if not self._first.done():
                self._first.set_exception(ModelError(reason))
                return
            if self._too_many_crashes():
                self.ended.set_result(
                    f"The engine failed {self._limits.crashes} times within {self._limits.window:g} s, "
                    f"the last time because {reason}."
                )
                return
            self.restarts += 1
            log.error("engine lost: %s; starting it again (restart %d)", reason, self.restarts)
            await asyncio.sleep(min(0.5 * (len(self._crashes) - 1), 2.0))

    async def _one_run(self) -> str:
        """Start an engine process and watch it until it ends; returns the reason."""
        self._silence, self._failure, self.beat = 0.0, None, Heartbeat(0.0)
        try:
            process = await EngineProcess.spawn(
                self._command,
                {"config": self._config, **self._kept()},
                self._receive,
            )
        except OSError as error:
            return f"it could not be started: {error}"
        self._process = process
        try:
            reason = await self._watch(process)
            self.up, self._process = False, None
            # Fail the requests in flight before waiting for the process to exit.
            self._down(engine_down(reason), process.record.keys())
            status = await process.end(LEAVE_SECONDS if process.lost.done() else 0.0)
            return self._failure or f"{reason} (exit status {status})"
        except asyncio.CancelledError:
            process.write(frame([Stop()]))
            await process.end(STOP_SECONDS if self.up else 0.0)
            raise
        finally:
            self._loading.close()
            self.up, self._process = False, None

    def _kept(self) -> dict[str, Any]:
        """What an engine has of the one before it: which models are paused, and the numbers of their weights, as far as
        it loads the same."""
        if self.ready is None:
            return {"paused": [], "update_numbers": []}
        numbers = [0 if model.weights_sent else model.update_number for model in self.ready.models]
        return {"paused": self.ready.paused, "update_numbers": numbers}

    async def _watch(self, process: EngineProcess) -> str:
        """Return the reason when the process is lost or must be replaced."""
        tick = self._limits.tick
        while True:
            done, _ = await asyncio.wait({process.lost}, timeout=tick)
            if done:
                return self._failure or process.lost.result()
            # Counted in ticks of this loop, not by the clock: while the front process itself is stopped, messages
            # of the engine can't be read.
            self._silence += tick
            problem = self._exceeded_limit()
            if problem is not None:
                return problem

    def _exceeded_limit(self) -> str | None:
        limits = self._limits
        limit = limits.silent if self.up else limits.starting
        if self._silence > limit:
            return f"it was silent for {limit:g} s"
        what, limit = ("loading weights", limits.starting) if self.beat.work else ("one pass", limits.one_pass)
        if self.beat.age > limit:
            return f"{what} took longer than {limit:g} s"
        return None

    def _too_many_crashes(self) -> bool:
        """Record a crash; whether the limit on crashes within the window is reached."""
        now = time.monotonic()
        self._crashes.append(now)
        while now - self._crashes[0] > self._limits.window:
            self._crashes.popleft()
        return len(self._crashes) >= self._limits.crashes

    # -- messages ----------------------------------------------------------------------------

    def _receive(self, messages: list[EngineMessage]) -> None:
        self._silence = 0.0
        for message in messages:
            if isinstance(message, Heartbeat):
                if message.work and message.work != self.beat.work:
                    log.info("engine: %s", message.work)
                self.beat = message
            elif isinstance(message, Ready):
                if self.ready is not None:
                    _warn_of_lost_weights(self.ready, message)
                self.ready, self.up = message, True
                if not self._first.done():
                    self._first.set_result(None)
            elif isinstance(message, ModelsChanged):
                self._change(message)
            elif isinstance(message, Loading):
                self._loading.show(message)
            elif isinstance(message, Failed):
                self._failure = message.message
            else:
                self._deliver(message)

    def _change(self, message: ModelsChanged) -> None:
        """Update what is served, and the configuration with which an engine is restarted."""
        if self.ready is not None:
            self.ready = self.ready.after(message)
        self._config = {**self._config, "models": message.settings}
        self._deliver(message)


def _warn_of_lost_weights(before: Ready, after: Ready) -> None:
    """Weights that were sent died with the engine; their label went with them."""
    for old, new in zip(before.models, after.models, strict=True):
        if old.weight_version != new.weight_version:
            log.warning(
                "%s has the weights of its folder again, labelled %r; those labelled %r were sent and are lost",
                new.name, new.weight_version, old.weight_version,
            )  # fmt: skip


def supervised(
    config: Config, *, command: Sequence[str] = COMMAND, limits: WatchdogLimits | None = None
) -> Callable[[Deliver, Down], Supervisor]:
    """Returns the function with which a :class:`.client.Client` makes its transport to an engine process."""
    limits = limits or WatchdogLimits(one_pass=config.server.watchdog_timeout)
    return lambda deliver, down: Supervisor(config.dump(), deliver, down, command=command, limits=limits)


class LoadingDisplay:
    """Shows the phases of the engine's start-up: log lines, and on a terminal a bar for phases with steps."""

    def __init__(self) -> None:
        self._bars: Progress | None = None
        self._task: TaskID | None = None

    def show(self, phase: Loading) -> None:
        """A phase begins, or goes on."""
        if not phase.steps or not sys.stderr.isatty():
            if not phase.done:
                log.info("engine: %s", phase.what)
            return
        if phase.done == phase.steps:
            self.close()
        elif self._bars is None or self._task is None:
            self._begin(phase)
        else:
            self._bars.update(self._task, completed=phase.done, refresh=True)

    def close(self) -> None:
        """Remove the bar."""
        if self._bars is not None:
            self._bars.stop()
        self._bars = self._task = None

    def _begin(self, phase: Loading) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bars = Progress(*columns, console=Console(stderr=True), transient=True)
        self._task = self._bars.add_task(phase.what, total=phase.steps, completed=phase.done)
        self._bars.start()
