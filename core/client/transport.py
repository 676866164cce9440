"""The protocol that both transports implement."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

from trunkline.core.engine.messages import Beat, EngineMessage, Ready
from trunkline.core.errors import EngineDown

Deliver = Callable[[EngineMessage], None]
Down = Callable[[EngineDown, Iterable[int]], None]


class Transport(Protocol):
    """The way to an engine and back. Lives on the client's event loop, where it calls ``deliver`` and ``down``.

    ``deliver`` gets every message about requests, calls and changed models. ``down`` is called when the engine is
    lost: with the error for those who wait, and the keys of what it was working on.
    """

    @property
    def ready(self) -> Ready | None:
        """What is served; it stays while the engine is replaced."""

    @property
    def up(self) -> bool:
        """Is an engine there that takes requests?"""

    @property
    def beat(self) -> Beat:
        """The engine's last heartbeat."""

    @property
    def restarts(self) -> int:
        """How often the engine was replaced."""

    async def start(self) -> None:
        """Return when the engine is ready. ModelError when it can't be."""

    async def stop(self) -> None:
        """End the engine, and return when it has ended."""

    def write(self, messages: list[Any]) -> None:
        """Hand messages to the engine in their order; lost when there is none."""

    def unavailable(self) -> EngineDown:
        """Why it isn't ``up``."""
