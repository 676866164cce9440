"""Several engine replicas behind one front: which of them calls go to, and their replies to a request."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import msgspec

T = TypeVar("T")

current_replica: ContextVar[str | None] = ContextVar("current_replica", default=None)
"""The replica that :class:`.clients.EngineClient` means in the current task: its models, load and calls. None: all."""


class HasReplicas(Protocol):
    """What :func:`on_each_replica` needs of an engine client."""

    @property
    def replicas(self) -> Sequence[str]:
        """Names of the replicas; empty on one machine."""

    def replicas_of(self, model: str) -> Sequence[str]:
        """Those of them that serve a model."""


@dataclass(frozen=True, slots=True)
class ReplicaReply:
    """A replica's reply to a request. ``headers`` have names in lower case."""

    replica: str
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def ok(self) -> bool:
        """Whether the status is below 400."""
        return self.status < 400

    def json(self) -> Any:
        """The body as JSON. msgspec.DecodeError when it is something else."""
        return msgspec.json.decode(self.body)


@contextmanager
def on_replica(name: str) -> Iterator[None]:
    """In the block, the engine client means this replica; "" chooses none. Tasks that the block starts keep it."""
    token = current_replica.set(name or None)
    try:
        yield
    finally:
        current_replica.reset(token)


async def on_each_replica(engine: HasReplicas, work: Callable[[], Awaitable[T]], model: str = "") -> dict[str, T]:
    """Await ``work()`` for each replica at the same time, of a model or of all: replica -> result.

    When all have ended, the first error is raised, if there is one. Where there is nothing to choose, because there
    are no replicas or one is chosen already, ``work()`` is awaited once, and the key is the chosen one's name or "".
    """
    chosen = current_replica.get()

    async def run(name: str) -> T:
        with on_replica(name):
            return await work()

    names: Sequence[str] = (chosen,) if chosen else engine.replicas_of(model) if model else engine.replicas
    names = names or ("",)
    return dict(zip(names, await all_results(map(run, names)), strict=True))


async def all_results(work: Iterable[Awaitable[T]]) -> list[T]:
    """The results of all, in their order. When all have ended, the first error is raised, if there is one."""
    import asyncio  # here: `trunkline --help` imports this module, and needs no event loop

    results = await asyncio.gather(*work, return_exceptions=True)
    found: list[T] = []
    for result in results:
        if isinstance(result, BaseException):
            raise result
        found.append(result)
    return found
