"""How a front reaches the replicas of a group: the interface that :mod:`.deployments` implements with Ray."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from typing import Any, Protocol


class Handle(Protocol):
    """Methods raise what the transport of the calls raises, such as Ray's error for an actor that has died."""

    def watch(self, changed: Callable[[Sequence[str]], None]) -> None:
        """Call ``changed`` with the names of the replicas that take requests, now and when they change.

        It may be called from any thread.
        """

    def stream(self, replica: str, front: str) -> AsyncGenerator[bytes]:
        """:meth:`.relay.Relay.stream` of a replica."""

    def submit(self, replicas: Sequence[str], front: str, body: bytes) -> Coroutine[Any, Any, bytes]:
        """:meth:`.relay.Relay.submit` of the first of these replicas that accepts it; aborts it when cancelled."""

    def call(self, replica: str, front: str, body: bytes) -> Coroutine[Any, Any, bytes]:
        """:meth:`.relay.Relay.call` of a replica."""
