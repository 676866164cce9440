"""Replicas without Ray: relays in this process, each with a child process that is no engine (fake_engine.py)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from typing import Any

import pytest

from trunkline.core.client.client import Client
from trunkline.core.client.supervisor import WatchdogLimits, supervised
from trunkline.core.cluster.relay import Relay
from trunkline.core.cluster.transport import ReplicaTransport
from trunkline.core.config import Config
from trunkline.core.host import Host


class LocalHandle:
    """Implements :class:`trunkline.core.cluster.handle.Handle` over relays in this process.

    ``accepts``: names of the replicas that accept requests, None = all. ``submitted``: which one took each. ``slow``:
    seconds by which a replica's stream is late. ``cut``: their streams end.
    """

    def __init__(self, relays: dict[str, Relay] | None = None) -> None:
        self.relays: dict[str, Relay] = {} if relays is None else relays
        self.slow: dict[str, float] = {}
        self.accepts: set[str] | None = None
        self.submitted: list[str] = []
        self.cut: set[str] = set()
        self._changed: Callable[[Sequence[str]], None] = lambda names: None

    def watch(self, changed: Callable[[Sequence[str]], None]) -> None:
        self._changed = changed
        self.show()

    def show(self, *names: str) -> None:
        """Say which replicas take requests, by default all."""
        self._changed(names or list(self.relays))

    async def stream(self, replica: str, front: str) -> AsyncGenerator[bytes]:
        updates = self.relays[replica].stream(front)
        try:
            async for body in updates:
                if replica in self.cut:
                    raise ConnectionError("the stream was cut")
                await asyncio.sleep(self.slow.get(replica, 0))
                yield body
        finally:
            await updates.aclose()

    async def submit(self, replicas: Sequence[str], front: str, body: bytes) -> bytes:
        for name in replicas:
            if self.accepts is None or name in self.accepts:
                self.submitted.append(name)
                return await self.relays[name].submit(front, body)
        raise ConnectionError("nobody accepts it")

    async def call(self, replica: str, front: str, body: bytes) -> bytes:
        return await self.relays[replica].call(front, body)


class Cluster:
    """A client of some replicas, and what a test needs to make them fail."""

    def __init__(self, host: Host, config: Config, command: Sequence[str], limits: WatchdogLimits) -> None:
        self._host, self._config, self._command, self._limits = host, config, command, limits
        self.handle = LocalHandle()
        self._fronts: list[Client[ReplicaTransport]] = []

    async def front(self, handle: LocalHandle) -> Client[ReplicaTransport]:
        """A client that is ready."""
        client = Client(self._config, self._host, lambda *calls: ReplicaTransport([handle], *calls))
        self._fronts.append(client)
        await client.start()
        return client

    async def add(self, name: str, config: Config | None = None) -> Relay:
        """Start a replica, by default of the same configuration."""
        connect = supervised(config or self._config, command=self._command, limits=self._limits)
        relay = self.handle.relays[name] = Relay(name, connect)
        await relay.start()
        self.handle.show()
        return relay

    async def stop(self) -> None:
        for front in self._fronts:
            await front.stop()
        await asyncio.gather(*(relay.stop() for relay in self.handle.relays.values()))


@pytest.fixture
async def cluster(
    host: Host, command: list[str], configure: Callable[..., Config]
) -> AsyncIterator[Callable[..., Any]]:
    """``client, cluster = await cluster(2, **server settings)``: a client that is ready, of as many replicas."""
    made: list[Cluster] = []

    async def make(count: int, limits: WatchdogLimits | None = None, **server: Any) -> Any:
        config = configure(**server)
        started = Cluster(host, config, command, limits or WatchdogLimits())
        made.append(started)
        await asyncio.gather(*(started.add(f"r{number}") for number in range(count)))
        client = await started.front(started.handle)
        async with asyncio.timeout(10):
            while len(client.transport.replicas) < count or not client.transport.healthy:
                await asyncio.sleep(0.01)
        return client, started

    yield make
    for started in made:
        await started.stop()


@pytest.fixture
def until() -> Callable[..., Any]:
    """``await until(condition)``: return when it holds."""

    async def wait(condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not condition():
                await asyncio.sleep(0.01)

    return wait


@pytest.fixture
def handle() -> type[LocalHandle]:
    """For a second front: ``handle(relays)``."""
    return LocalHandle
