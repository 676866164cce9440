"""The transport to engine replicas: one group of them for each model."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from typing import Any

from trunkline.core.client.transport import Deliver, Down
from trunkline.core.engine.messages import Abort, Call, Heartbeat, Load, ModelsChanged, Ready, Submit
from trunkline.core.errors import EngineDown
from trunkline.core.types import current_replica

from .group import NONE_UP, Group
from .handle import Handle
from .link import Link


class ReplicaTransport:
    """See :class:`core.client.transport.Transport`. What restarts a replica is Ray, or the replica its engine.

    ``ended`` is never set: a front can't know that replicas are gone for good.
    """

    replicated = True

    def __init__(self, handles: Sequence[Handle], deliver: Deliver, down: Down) -> None:
        """``handles``: one for each model, in the order of the configuration."""
        self.ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._deliver = deliver
        self._groups = [Group(handle, deliver, down, self._changed) for handle in handles]
        self._ready: Ready | None = None  # of all groups
        self._up = asyncio.Event()  # a replica of each model has been up

    async def start(self) -> None:
        """Return when a replica of each model is up."""
        for group in self._groups:
            group.replicas.start()
        await self._up.wait()

    async def stop(self) -> None:
        """Let go of the replicas: requests that they still run for this front are aborted."""
        await asyncio.gather(*(group.stop() for group in self._groups))

    def write(self, messages: list[Any]) -> None:
        for message in messages:
            if isinstance(message, Abort):
                for group in self._groups:
                    group.write(message)
            elif isinstance(message, Submit | Call):
                self._group_of(message).write(message)

    def unavailable(self) -> EngineDown:
        return EngineDown(NONE_UP)

    def _group_of(self, message: Submit | Call) -> Group:
        if isinstance(message, Call) and message.replica:
            return next(
                (group for group in self._groups if group.replicas.find(message.replica) is not None), self._groups[0]
            )
        return self._serving(message.model) or self._groups[0]  # "" is the primary model

    def _serving(self, model: str) -> Group | None:
        """The group of a model, by one of its names."""
        models = () if self._ready is None else self._ready.models
        pairs = zip(self._groups, models, strict=False)
        return next((group for group, served in pairs if model in (served.name, *served.aliases)), None)

    # -- what there is: of the chosen replica, or of all ---------------------------------------

    @property
    def replicas(self) -> Sequence[str]:
        return [name for group in self._groups for name in group.replicas.names]

    def replicas_of(self, model: str) -> Sequence[str]:
        group = self._serving(model)
        return self.replicas if group is None else group.replicas.names

    @property
    def ready(self) -> Ready | None:
        return self._ready if current_replica.get() is None else self._links[0].ready if self._links else None

    @property
    def up(self) -> bool:
        return any(link.up for link in self._links)

    @property
    def beat(self) -> Heartbeat:
        loads: dict[str, Load] = {}
        for link in self._links:
            for load in link.beat.loads:
                loads[load.model] = load if load.model not in loads else _sum(loads[load.model], load)
        return Heartbeat(max((link.beat.age for link in self._links), default=0.0), list(loads.values()))

    @property
    def restarts(self) -> int:
        gone = sum(group.replicas.broken for group in self._groups) if current_replica.get() is None else 0
        return gone + sum(link.state.restarts for link in self._links)

    @property
    def healthy(self) -> bool:
        if current_replica.get() is not None:
            return any(link.healthy for link in self._links)
        return all(any(link.healthy for link in group.replicas.up) for group in self._groups)

    @property
    def _links(self) -> list[Link]:
        chosen = current_replica.get()
        if chosen is None:
            return [link for group in self._groups for link in group.replicas.links.values()]
        return [link for group in self._groups if (link := group.replicas.find(chosen)) is not None]

    def _changed(self, keys: Collection[int]) -> None:
        """A replica that runs these requests has come, gone, or has another state."""
        ready = [group.replicas.ready for group in self._groups if group.replicas.ready is not None]
        if len(ready) < len(self._groups):
            return
        models = [one.models[0] for one in ready]
        before = self._ready
        if before is None or any(old is not new for old, new in zip(before.models, models, strict=True)):
            plan = [row for one in ready for row in one.plan]
            seconds = max((one.seconds for one in ready), key=lambda phases: sum(phases.values()))
            self._ready = Ready(models, plan, seconds)
            if before is not None:
                self._deliver(ModelsChanged(models, [], keys=list(keys)))
        if all(group.replicas.up for group in self._groups):
            self._up.set()


def _sum(one: Load, other: Load) -> Load:
    """The load of a model at two replicas."""
    return Load(
        one.model,
        one.waiting + other.waiting,
        one.running + other.running,
        one.retracted + other.retracted,
        one.free_slots + other.free_slots,
        one.slots + other.slots,
        one.waiting_tokens + other.waiting_tokens,
    )
