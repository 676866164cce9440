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
from trunkline.core.types import EngineClient, on_replica

PROBE_SECONDS = 20.0  # time limit of a health probe
POLL_SECONDS = 0.05  # interval at which a waiting probe checks for results of other requests


def health_routes(engine: EngineClient, lifecycle: Lifecycle) -> Iterator[HTTPRouteHandler]:
    probe_runner = ProbeRunner(engine, lifecycle)
    methods = [HttpMethod.GET, HttpMethod.HEAD]
    probe = {"scope": "public", "replies": {200: None, 503: None}}

    @route(["/health", "/ready"], http_method=methods, opt=probe, status_code=200)
    async def health() -> Response[bytes]:
        """200 while the engine runs and accepts requests, else 503. Computes nothing."""
        return empty_response(200 if lifecycle.ready else 503)

    @route("/health_generate", http_method=methods, opt=probe, status_code=200)
    async def health_generate() -> Response[bytes]:
        """200 if the model completes the smallest request, or gives a result of any other one, within 20 s."""
        alive = lifecycle.ready and await probe_runner.is_alive()
        return empty_response(200 if alive else 503)

    @route("/ping", http_method=methods, opt={"scope": "public", "replies": {200: None}}, status_code=200)
    async def ping() -> Response[bytes]:
        """200 whenever the HTTP process answers."""
        return empty_response()

    yield from (health, health_generate, ping)


class ProbeRunner:
    """Runs one health probe at a time, which concurrent callers share."""

    def __init__(self, engine: EngineClient, lifecycle: Lifecycle) -> None:
        self._engine = engine
        self._lifecycle = lifecycle
        self._running: asyncio.Task[bool] | None = None

    async def is_alive(self) -> bool:
        """Whether the probe, or any other request, gives a result within ``PROBE_SECONDS``.

        Other requests count because on a busy server the probe may wait for longer than that.
        """
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(self._probe(), name="health probe")
        results_before, deadline = self._lifecycle.results(), time.monotonic() + PROBE_SECONDS
        while time.monotonic() < deadline:
            done, _ = await asyncio.wait({self._running}, timeout=POLL_SECONDS)
            if done:
                return self._running.result()
            if self._lifecycle.results() != results_before:
                return True
        return False

    async def _probe(self) -> bool:
        """Whether a replica answers, or the engine where there are none."""
        probes = [asyncio.create_task(self._probe_one(name)) for name in self._engine.replicas or ("",)]
        try:
            for done in asyncio.as_completed(probes):
                if await done:
                    return True
            return False
        finally:
            for probe in probes:
                probe.cancel()

    async def _probe_one(self, replica: str) -> bool:
        with on_replica(replica):
            try:
                await self._engine.call("probe")
            except RequestError:
                return False
        return True
