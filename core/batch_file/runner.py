"""Sends the requests of a file to an app in this process, several at a time, and writes the answers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator, Iterator, Set
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
from litestar import Litestar

from trunkline.core.errors import ConfigError, TrunklineError

from .answers import AnswerFile
from .lines import BatchRequest, InvalidLine, read_line
from .schemas import BatchAnswer, Response, new_id

BUSY = (429, 503)  # statuses after which a request is sent again
ATTEMPTS = 20
MOST_SECONDS = 30.0  # between two attempts


class BatchRunner:
    """One run over a file of requests. ``report`` is called after each answer."""

    def __init__(
        self,
        app: Litestar,
        requests: Path,
        answers: AnswerFile,
        *,
        concurrency: int,
        api_key: str | None = None,
        report: Callable[[], None] = lambda: None,
    ) -> None:
        """``concurrency``: the number of requests that run at a time."""
        self._app = app
        self._path = requests
        self._answers = answers
        self._concurrency = concurrency
        self._headers = {"content-type": "application/json"}
        if api_key:
            self._headers["authorization"] = f"Bearer {api_key}"
        self._report = report

    async def run(self) -> None:
        """Answer all lines that have no answer yet. If it is cancelled, the requests that run have none.

        TrunklineError when answers can't be written.
        """
        try:
            await self._run()
        except ExceptionGroup as group:  # of the workers, and of the tasks of the app's lifespan
            failed: Exception | None = group.subgroup(TrunklineError)
            while isinstance(failed, ExceptionGroup):
                failed = failed.exceptions[0]
            raise failed or group from None

    async def _run(self) -> None:
        app: Any = self._app  # litestar's type of an ASGI app isn't httpx's
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with self._app.lifespan(), httpx.AsyncClient(transport=transport, base_url="http://batch") as client:
            with closing(self._pending(request_paths(self._app))) as requests:
                async with asyncio.TaskGroup() as group:
                    for _ in range(self._concurrency):
                        group.create_task(self._work(client, requests))

    async def _work(self, client: httpx.AsyncClient, requests: Iterator[BatchRequest]) -> None:
        for request in requests:
            response = await self._send(client, request)
            self._append(BatchAnswer(id=new_id(), custom_id=request.custom_id, response=response))

    async def _send(self, client: httpx.AsyncClient, request: BatchRequest) -> Response:
        """The response to a request, which is repeated while the server is busy or the engine starts again."""
        for _ in range(ATTEMPTS - 1):
            reply = await self._post(client, request)
            if reply.status_code not in BUSY:
                break
            await asyncio.sleep(min(float(reply.headers.get("retry-after", 1)), MOST_SECONDS))
        else:
            reply = await self._post(client, request)
        try:
            body = reply.json()
        except ValueError:
            body = reply.text
        return Response(reply.status_code, reply.headers.get("x-request-id", ""), body)

    async def _post(self, client: httpx.AsyncClient, request: BatchRequest) -> httpx.Response:
        return await client.post(request.url, content=request.body, headers=self._headers)

    def _pending(self, urls: Set[str]) -> Generator[BatchRequest]:
        """The requests without an answer. Lines that are no requests are answered here."""
        seen: set[str] = set()
        for number, line in read_lines(self._path):
            try:
                request = read_line(line, number, urls, seen)
            except InvalidLine as problem:
                if number not in self._answers.invalid:
                    self._append(BatchAnswer(id=new_id(), custom_id=problem.custom_id, error=problem.error))
                continue
            if request.custom_id not in self._answers.answered:
                yield request

    def _append(self, answer: BatchAnswer) -> None:
        self._answers.append(answer)
        self._report()


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file that aren't blank, with their numbers from 1. ConfigError if it can't be read."""
    try:
        with path.open("rb") as file:
            yield from ((number, line) for number, line in enumerate(file, 1) if not line.isspace())
    except OSError as error:
        raise ConfigError(f"Can't read the requests in {path}: {error.strerror or error}.") from error


def request_paths(app: Litestar) -> Set[str]:
    """The paths of an app that take a JSON body by POST and need no administrator's key."""
    return {
        route.path
        for route in app.routes
        for handler in getattr(route, "route_handlers", ())
        if "POST" in handler.http_methods and handler.opt.get("scope") == "infer" and "body" in handler.opt
    }
