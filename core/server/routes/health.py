"""``/health``, ``/ready``, ``/health_generate`` and ``/ping``."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

from litestar import HttpMethod, Response, route
from litestar.handlers import HTTPRouteHandler

from trunkline.core.errors import RequestError
from trunkline.core.server.api.bodies import empty_response
from trunkline.core.server.lifecycle import Lifecycle
from trunkline.core.types import EngineClient

PROBE_SECONDS = 20.0  # what a health probe may take
BUSY_TICK = 0.05  # how often a waiting probe looks for other results


def health_routes(engine: EngineClient, lifecycle: Lifecycle) -> Iterator[HTTPRouteHandler]:
    prober = Prober(engine, lifecycle)
    methods = [HttpMethod.GET, HttpMethod.HEAD]
    probe = {"scope": "public", "replies": {200: None, 503: None}}

    @route(["/health", "/ready"], http_method=methods, opt=probe, status_code=200)
    async def health() -> Response[bytes]:
        """200 while the engine is up and takes requests, else 503. No request is made."""
        return empty_response(200 if lifecycle.ready else 503)

    @route("/health_generate", http_method=methods, opt=probe, status_code=200)
    async def health_generate() -> Response[bytes]:
        """200 when the model has answered the smallest request, or anything else, in time."""
        alive = lifecycle.ready and await prober.alive()
        return empty_response(200 if alive else 503)

    @route("/ping", http_method=methods, opt={"scope": "public", "replies": {200: None}}, status_code=200)
    async def ping() -> Response[bytes]:
        """200: the HTTP process answers."""
        return empty_response()

    yield from (health, health_generate, ping)


class Prober:
    """Runs one probe at a time; those who ask meanwhile share it."""

    def __init__(self, engine: EngineClient, lifecycle: Lifecycle) -> None:
        self._engine = engine
        self._lifecycle = lifecycle
        self._running: asyncio.Task[bool] | None = None

    async def alive(self) -> bool:
        """Did the probe, or any other request, bring a result within ``PROBE_SECONDS``?

        A queue in front of the probe is no reason to call a busy server dead.
        """
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(self._probe(), name="health probe")
        before, deadline = self._lifecycle.results(), time.monotonic() + PROBE_SECONDS
        while time.monotonic() < deadline:
            done, _ = await asyncio.wait({self._running}, timeout=BUSY_TICK)
            if done:
                return self._running.result()
            if self._lifecycle.results() != before:
                return True
        return False

    async def _probe(self) -> bool:
        try:
            await self._engine.call("probe")
        except RequestError:
            return False
        return True
