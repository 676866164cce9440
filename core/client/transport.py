"""The protocol that all transports implement, and the message of a request."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, Protocol

import msgspec
from msgspec import Raw

from trunkline.core.engine.messages import EngineMessage, Heartbeat, Ready, Submit
from trunkline.core.errors import EngineDown, RequestError
from trunkline.core.types import Submission

Deliver = Callable[[EngineMessage], None]


class Down(Protocol):
    """Called when an engine is lost."""

    def __call__(self, error: EngineDown, working_on: Iterable[int], lost: Collection[int] | None = None, /) -> None:
        """``error``: of the requests and calls in flight, which end. ``working_on``: keys of those that were running.

        ``lost``: keys of those that end, where there is more than one engine; None = all.
        """


class Transport(Protocol):
    """Sends messages to an engine and receives its messages. ``deliver`` and ``down`` are called on the client's
    event loop.

    One that has several replicas gives, while one of them is chosen (:data:`core.types.current_replica`), ``ready``,
    ``up``, ``beat`` and ``restarts`` of this one, else those of all together. It sends a Call to the replica that it
    names. A replica that has gone isn't up, and has neither models nor loads.

    ``deliver`` gets every message about requests, calls and changed models.
    """

    @property
    def replicated(self) -> bool:
        """Whether it is for any number of replicas; False for one engine on one machine."""

    @property
    def replicas(self) -> Sequence[str]:
        """Names of the engine replicas at the moment; empty where there is one engine, on one machine."""

    def replicas_of(self, model: str) -> Sequence[str]:
        """Those of them that serve a model, by one of its names; all for an unknown name."""

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


class EndingTransport(Transport, Protocol):
    """A transport that may end the server."""

    @property
    def ended(self) -> asyncio.Future[str]:
        """Done when the engine can't be kept running: the reason."""


Connect = Callable[[Deliver, Down], EndingTransport]


def make_submit(key: int, model: str, task: str, item: Submission) -> Submit:
    """A submission on the wire. RequestError for token ids that aren't int32."""
    try:
        prompt = array("i", item.prompt).tobytes()
    except (OverflowError, TypeError):
        raise RequestError("Token ids must be integers below 2**31.", param="input_ids") from None
    return Submit(
        key=key,
        model=model,
        task=task,
        rid=item.rid,
        prompt=prompt,
        params=Raw(msgspec.msgpack.encode(item.params)),
        priority=item.priority,
        salt=item.salt,
        cacheable=item.cacheable,
        second_at=item.second_at,
        embeds=item.embeds,
    )
