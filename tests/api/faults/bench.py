"""A server under test, and a register of functions that cause faults in it."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from .clients import PATIENCE, POLL, Job, client_of


@dataclass
class Bench:
    """A server under test. ``start`` starts it, again if it has ended; ``checkpoints``: of weight updates, by fault.

    ``under_fault``: the jobs as they are sent during the fault, if other answers are right then.

    Per repetition: its ``number``; ``happened``: the time of the fault, by time.monotonic; ``outcomes``: those of
    requests that the fault itself sends.
    """

    start: Callable[[], Any]
    jobs: list[Job]
    checkpoints: dict[str, Path]
    under_fault: list[Job] = field(default_factory=list)
    number: int = 0
    happened: asyncio.Future[float] = field(default_factory=asyncio.Future)
    outcomes: Counter[str] = field(default_factory=Counter)

    @property
    def server(self) -> Any:
        return self.start()

    def mark(self, time_of_fault: float | None = None) -> None:
        """The fault has just happened; from now on, the time until the server answers is measured.

        Only the first call of a repetition counts.
        """
        if not self.happened.done():
            self.happened.set_result(time_of_fault or time.monotonic())

    async def call(self, path: str, body: dict[str, Any] | None = None) -> httpx.Response:
        """A POST request that isn't counted."""
        async with client_of(self.server.url) as http:
            return await asyncio.wait_for(http.post(path, json=body or {}), PATIENCE)

    async def arm(self, point: str = "", error: str = "", count: int = 1) -> dict[str, Any]:
        """Arm a fault in the engine; what happened there so far."""
        answer = await self.call("/fault", {"point": point, "error": error, "count": count})
        assert answer.status_code == 200, answer.text
        report: dict[str, Any] = answer.json()
        return report

    async def health(self) -> int:
        async with client_of(self.server.url) as http:
            return (await http.get("/health")).status_code

    async def state(self) -> dict[str, Any]:
        """The server's figures of its first model."""
        return (await self.states())[0]

    async def states(self) -> list[dict[str, Any]]:
        """The figures of each replica, or of the one server."""
        async with client_of(self.server.url) as http:
            found: list[dict[str, Any]] = (await http.get("/get_server_info")).json()["internal_states"]
        return found


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    """Wait for a condition; AssertionError after PATIENCE seconds."""
    deadline = time.monotonic() + PATIENCE
    while not await condition():
        assert time.monotonic() < deadline, condition
        await asyncio.sleep(POLL)


Injection = Callable[[Bench], Awaitable[None]]


class Injections(dict[str, Injection]):
    """Functions that cause faults, by the name of the fault."""

    def causes(self, name: str) -> Callable[[Injection], Injection]:
        """Register the decorated function."""

        def register(function: Injection) -> Injection:
            self[name] = function
            return function

        return register


async def is_health(bench: Bench, status: int) -> bool:
    return await bench.health() == status
