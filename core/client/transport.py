"""The protocol that both transports implement."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

from trunkline.core.engine.messages import EngineMessage, Heartbeat, Ready
from trunkline.core.errors import EngineDown

Deliver = Callable[[EngineMessage], None]
Down = Callable[[EngineDown, Iterable[int]], None]


class Transport(Protocol):
    """Sends messages to an engine and receives its messages. ``deliver`` and ``down`` are called on the client's
    event loop.

    ``deliver`` gets every message about requests, calls and changed models. ``down`` is called when the engine is
    lost, with the error for the requests in flight and the keys of those that were running.
    """

    @property
    def ready(self) -> Ready | None:
        """The served models; kept during a restart of the engine."""

    @property
    def up(self) -> bool:
        """Whether an engine runs and accepts requests."""

    @property
    def healthy(self) -> bool:
        """Whether an engine is ``up`` and makes progress."""

    @property
    def beat(self) -> Heartbeat:
        """The engine's last heartbeat."""

    @property
    def restarts(self) -> int:
        """How often the engine was restarted."""

    async def start(self) -> None:
        """Return when the engine is ready. ModelError when it can't start."""

    async def stop(self) -> None:
        """End the engine, and return when it has ended."""

    def write(self, messages: list[Any]) -> None:
        """Send messages to the engine in this order. They are dropped while there is no engine."""

    def unavailable(self) -> EngineDown:
        """The error of requests while it isn't ``up``."""
