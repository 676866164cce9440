"""Replicas without Ray: relays in this process, each with a child process that is no engine (fake_engine.py)."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from typing import Any

import pytest

from trunkline.core.client.client import Client
from trunkline.core.client.supervisor import WatchdogLimits, supervised
from trunkline.core.cluster.handle import Attachment
from trunkline.core.cluster.messages import Address, decode_address, encode_address
from trunkline.core.cluster.replica.front_connection import FrontConnection
from trunkline.core.cluster.replica.relay import Relay
from trunkline.core.cluster.transport import ReplicaTransport
from trunkline.core.config import Config
from trunkline.core.engine.messages import Submit
from trunkline.core.host import Host


class Path:
    """Forwards a connection to a replica, as the network between a front and a replica does.

    ``delay``: seconds by which what the replica sends is late.
    """

    def __init__(self, delay: float) -> None:
        self.delay = delay
        self._writers: list[asyncio.StreamWriter] = []
        self._tasks: list[asyncio.Task[None]] = []

    async def open(self, address: Address) -> Address:
        """An address that leads to this one."""
        self._target = address
        self._server = await asyncio.start_server(self._connect, "127.0.0.1", 0)
        return Address("127.0.0.1", self._server.sockets[0].getsockname()[1], address.ticket)

    async def close(self) -> None:
        self._server.close()
        for writer in self._writers:
            writer.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        replica, to_replica = await asyncio.open_connection(self._target.host, self._target.port)
        self._writers += [writer, to_replica]
        for source, target, late in ((reader, to_replica, False), (replica, writer, True)):
            self._tasks.append(asyncio.create_task(self._forward(source, target, late)))

    async def _forward(self, source: asyncio.StreamReader, target: asyncio.StreamWriter, late: bool) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await source.read(1 << 16):
                await asyncio.sleep(self.delay if late else 0)
                target.write(data)
        target.close()


class LocalHandle:
    """Implements :class:`trunkline.core.cluster.handle.Handle` over relays in this process.

    ``slow``: seconds by which a replica's messages are late. ``cut``: their connections end, and can't be made.
    ``held``: not set while the ends of calls are delayed, as Ray's may be when an actor dies.
    """

    def __init__(self, relays: dict[str, Relay] | None = None) -> None:
        self.relays: dict[str, Relay] = {} if relays is None else relays
        self.slow: dict[str, float] = {}
        self.ended: dict[str, asyncio.Future[Any]] = {}  # of the last attachment to each replica
        self.held = asyncio.Event()
        self.held.set()
        self._cut: set[str] = set()
        self._paths: dict[str, Path] = {}
        self._changed: Callable[[Sequence[str]], None] = lambda names: None

    def watch(self, changed: Callable[[Sequence[str]], None]) -> None:
        self._changed = changed
        self.show()

    def show(self, *names: str) -> None:
        """Say which replicas take requests, by default all."""
        self._changed(names or list(self.relays))

    def delay(self, **seconds: float) -> None:
        """What the replicas send is late from now on."""
        self.slow = seconds
        for name, path in self._paths.items():
            path.delay = seconds.get(name, 0.0)

    async def cut(self, name: str) -> None:
        """The connection to a replica ends; none can be made until :meth:`mend`."""
        self._cut.add(name)
        await self._paths.pop(name).close()

    def mend(self) -> None:
        self._cut.clear()

    @contextlib.asynccontextmanager
    async def attach(self, replica: str) -> AsyncGenerator[Attachment]:
        if replica in self._cut:
            raise ConnectionError("the connection was cut")
        call = self.relays[replica].attach()
        path = self._paths[replica] = Path(self.slow.get(replica, 0.0))
        try:
            address = await path.open(decode_address(await anext(call)))
            ended = self.ended[replica] = asyncio.get_running_loop().create_future()
            yield Attachment(encode_address(address), ended)
        finally:
            try:
                await self.held.wait()
            finally:
                await path.close()
                await call.aclose()


class Cluster:
    """A client of some replicas, and what a test needs to make them fail."""

    def __init__(self, host: Host, config: Config, command: Sequence[str], limits: WatchdogLimits) -> None:
        self._host, self._config, self._command, self._limits = host, config, command, limits
        self.handle = LocalHandle()
        self.submitted: list[str] = []  # the replica that took each request
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
        relay = self.handle.relays[name] = Relay(connect)
        receive = relay.receive

        def record(front: FrontConnection, messages: list[Any]) -> None:
            self.submitted += [name for message in messages if isinstance(message, Submit)]
            receive(front, messages)

        relay.receive = record  # type: ignore[method-assign]
        await relay.start("127.0.0.1")
        self.handle.show()
        return relay

    def prefer(self, *names: str) -> None:
        """Requests go to these replicas, in this order."""
        for front in self._fronts:
            routing = front.transport._groups[0].replicas.routing
            routing.choose = lambda prompt: list(names)  # type: ignore[method-assign]

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
