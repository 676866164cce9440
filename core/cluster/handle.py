"""How a front finds the replicas of a group: the interface that :mod:`.deployments` implements with Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class Attachment:
    """A call to a replica that lasts as long as the connection that it allows.

    So Ray counts the connection, and waits for its end when the replica drains.
    ``ended`` is done when the replica, or what carries the call, has ended it.
    """

    address: bytes  # an encoded :class:`.messages.Address`
    ended: asyncio.Future[Any]


class Handle(Protocol):
    """How a front finds the replicas of a model."""

    def watch(self, changed: Callable[[Sequence[str]], None]) -> None:
        """Call ``changed`` with the names of the replicas that take requests, now and when they change.

        It may be called from any thread.
        """

    def attach(self, replica: str) -> AbstractAsyncContextManager[Attachment]:
        """:meth:`.replica.relay.Relay.attach` of a replica. Raises what carries the call, such as Ray's error for an
        actor that has died."""
