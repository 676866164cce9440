"""The main function of ``trunkline batch``: starts the engine, runs the requests, and stops on Ctrl-C."""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path
from typing import Any

from trunkline.core.client.client import Client
from trunkline.core.client.supervisor import Supervisor, supervised
from trunkline.core.config import Config
from trunkline.core.errors import ConfigError, TrunklineError
from trunkline.core.guard import forbid_pickle
from trunkline.core.host import Host
from trunkline.core.server.app import create_app
from trunkline.core.server.front import event_loop_runner, prepare

from .answers import AnswerFile
from .progress import show_progress
from .runner import BatchRunner, read_lines

INTERRUPTED = 130  # exit status after Ctrl-C, as of a shell
LEAST, MOST = 16, 1024  # default number of requests at a time


def run_batch(host: Host, config: Config, requests: Path, output: Path, concurrency: int | None) -> int:
    """Answer the requests of a file. The exit status: 0, or 1 if an answer in ``output`` is an error.

    ConfigError for files that can't be used, ModelError, and TrunklineError when the engine keeps crashing.
    """
    total = sum(1 for _ in read_lines(requests))
    if output.exists() and output.samefile(requests):
        raise ConfigError(f"--output {output} is the file of requests; choose another one.")
    with AnswerFile(output) as answers:
        forbid_pickle()
        for model in config.models:  # here, so that downloads show their progress and can be interrupted
            host.resolve_model(model.reference)
        batch = BatchRun(host, config, requests, answers, total, concurrency)
        event_loop_runner()(batch.run())
        print(batch.summary(), file=sys.stderr)
        return INTERRUPTED if batch.stopped else int(answers.failed > 0)


class BatchRun:
    """One run: the engine, the app, and the signals."""

    def __init__(
        self, host: Host, config: Config, requests: Path, answers: AnswerFile, total: int, concurrency: int | None
    ) -> None:
        self._host, self._config = host, config
        self._requests, self._answers, self._total = requests, answers, total
        self._concurrency = concurrency
        self.stopped = False  # SIGINT or SIGTERM was received

    async def run(self) -> None:
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        engine = Client(self._config, self._host, supervised(self._config))
        stopping = asyncio.create_task(stop.wait(), name="stop signal")
        try:
            if await self._first(engine.start(prepare), stopping):
                await self._first(self._work(engine), stopping, engine.transport.ended)
            if engine.transport.ended.done():
                raise TrunklineError(engine.transport.ended.result())
        finally:
            self.stopped = stop.is_set()
            stopping.cancel()
            await engine.stop()

    async def _first(self, work: Any, *others: asyncio.Future[Any]) -> bool:
        """Run ``work`` until it, or one of the others, has ended; whether it was ``work``, else it is cancelled."""
        task = asyncio.create_task(work)
        await asyncio.wait({task, *others}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
            return True
        task.cancel()
        await asyncio.wait({task})
        return False

    async def _work(self, engine: Client[Supervisor]) -> None:
        models = engine.models
        app = create_app(
            self._host,
            engine,
            self._config.settings,
            models=self._config.models,
            status=engine.status.model_state,
            metrics=engine.metrics,
        )
        running = 2 * sum(model.max_running_requests for model in models)
        with show_progress(self._answers, self._total) as report:
            await BatchRunner(
                app,
                self._requests,
                self._answers,
                concurrency=self._concurrency or min(max(running, LEAST), MOST),
                api_key=self._config.server.api_key,
                report=report,
            ).run()

    def summary(self) -> str:
        """What was done, for the end of the run."""
        count, failed = len(self._answers), self._answers.failed
        text = f"{count} of {self._total} answered, {failed} of them with an error: {self._answers.path}"
        return f"{text}. Stopped; the same command continues." if self.stopped else text
