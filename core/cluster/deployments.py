"""The deployments of Ray Serve: the replicas of a model, and the ingress with the HTTP routes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from typing import Any

import ray
from msgspec import structs
from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.handle import DeploymentHandle

from trunkline.core.client.supervisor import supervised
from trunkline.core.client.transport import Connect
from trunkline.core.config import Config
from trunkline.core.host import Host
from trunkline.core.logs import configure_logging

from .arguments import read_arguments
from .autoscaling import TOKENS
from .handle import Attachment
from .ingress import Ingress
from .members import watch
from .replica.relay import Relay
from .router import REPLICA, NamedReplica
from .transport import ReplicaTransport

MAX_ONGOING = 1 << 20  # calls of a replica: the front limits its requests itself


def load_config(dumped: dict[str, Any]) -> tuple[Host, Config]:
    """The plugins and the configuration of ``Config.dump()``."""
    selection = dumped["plugins"]
    host = Host.load(selection["only"], selection["without"])
    return host, Config.load(dumped, host)


class EngineReplica:
    """A replica: an actor that runs one engine process, as a front on one machine does.

    ``replica`` is for :class:`.router.NamedReplica`.
    """

    async def __init__(self, dumped: dict[str, Any]) -> None:  # type: ignore[misc]  # Ray awaits it
        _, config = load_config(dumped)
        self._relay = Relay(supervised(config))
        await self._relay.start(ray.util.get_node_ip_address())

    async def ping(self) -> None:
        """Returns when a replica is ready."""

    async def attach(self, *, replica: str) -> AsyncIterator[bytes]:
        async for address in self._relay.attach():
            yield address

    def check_health(self) -> None:
        """Raises when Ray should replace this replica: its engine hangs, or was started again too often."""
        engine = self._relay.engine
        if engine.ended.done():
            raise RuntimeError(engine.ended.result())
        if engine.up and not engine.healthy:
            raise RuntimeError("the engine has sent nothing for too long, or a pass takes too long")

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Ray, for :class:`.autoscaling.RequestTokens`."""
        return {TOKENS: float(sum(load.waiting_tokens + load.used for load in self._relay.engine.beat.loads))}

    async def __del__(self) -> None:
        if hasattr(self, "_relay"):  # else the configuration couldn't be loaded
            await self._relay.stop()


class RayHandle:
    """Implements :class:`.handle.Handle` by the handle of a deployment of :class:`EngineReplica`."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._handle = handle
        self._pings: set[asyncio.Task[None]] = set()

    def watch(self, changed: Callable[[Sequence[str]], None]) -> None:
        handle = self._handle
        watch(handle.deployment_id, changed)

        async def ping() -> None:  # starts the router in this process
            with contextlib.suppress(Exception):
                await handle.ping.remote()

        task = asyncio.create_task(ping())
        self._pings.add(task)
        task.add_done_callback(self._pings.discard)

    @contextlib.asynccontextmanager
    async def attach(self, replica: str) -> AsyncGenerator[Attachment]:
        call = self._handle.options(stream=True).attach.remote(**{REPLICA: replica})
        try:
            address = await anext(call)
            ended = asyncio.ensure_future(anext(call, b""))
            try:
                yield Attachment(address, ended)
            finally:
                ended.cancel()
                await asyncio.gather(ended, return_exceptions=True)
        finally:
            call.cancel()


class IngressReplica:
    """The front, in an actor behind Ray's HTTP proxy."""

    def __init__(self, dumped: dict[str, Any], *handles: DeploymentHandle[Any]) -> None:
        self._dumped, self._handles = dumped, handles

    def __serve_build_asgi_app__(self) -> Ingress:
        """Called by Ray after the constructor."""
        host, config = load_config(self._dumped)
        configure_logging(config.server.log_level)
        return Ingress(host, config, connection(self._handles))


def connection(handles: Sequence[DeploymentHandle[Any]]) -> Connect:
    """The function with which a client makes its transport to the replicas of each model."""
    return lambda *calls: ReplicaTransport([RayHandle(handle) for handle in handles], *calls)


def engine_deployments(config: Config, resources: dict[str, Any]) -> list[Any]:
    """A bound deployment for each model, ``engine-0`` and so on. ``resources``: Ray's options of each actor."""
    return [
        serve.deployment(EngineReplica)
        .options(
            name=f"engine-{index}",
            num_replicas=model.replicas or 1,
            max_ongoing_requests=MAX_ONGOING,
            request_router_config=RequestRouterConfig(request_router_class=NamedReplica),
            ray_actor_options=resources,
            graceful_shutdown_timeout_s=config.server.drain_timeout,
        )
        .bind(structs.replace(config, models=(model,)).dump())
        for index, model in enumerate(config.models)
    ]


def application(args: Mapping[str, Any]) -> Any:
    """The ingress over the engines; see :class:`.arguments.Arguments`."""
    arguments, config = read_arguments(args, Host.load())
    ingress = serve.deployment(serve.ingress()(IngressReplica)).options(
        name="ingress",
        num_replicas=arguments.ingress_replicas,
        max_ongoing_requests=MAX_ONGOING,
        graceful_shutdown_timeout_s=config.server.drain_timeout,
    )
    return ingress.bind(config.dump(), *engine_deployments(config, arguments.resources))
