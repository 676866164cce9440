"""Limits on the cost of reading bodies: bytes held by all requests, values in one body, time on the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, TypeVar

import msgspec
from msgspec import Struct

from trunkline.core.errors import RequestError
from trunkline.core.memory import give_memory_back
from trunkline.core.settings import ServerSettings

from .nesting import MAX_DEPTH, measure, too_deep

S = TypeVar("S", bound=Struct)

LARGE_BODY = 1 << 17  # bytes; after the response, freed memory is returned to the system
SMALL_BODY = 1 << 16  # bytes; decoded on the event loop, and accepted even if --max-held-body-bytes is exceeded
# Decoding holds the GIL: about 45 ms for MAX_ITEMS numbers of five digits, 30 ms for MAX_NODES arrays, objects and
# strings. The limits grow in proportion with --max-body-bytes.
MAX_ITEMS = 1 << 20
MAX_NODES = 1 << 16
DEFAULT_BODY = ServerSettings().max_body_bytes

TOO_DEEP = f"The body is nested too deeply: at most {MAX_DEPTH} arrays and objects may lie in one another."


class InvalidBody(RequestError):
    """The request's body isn't what the route takes (malformed, missing, wrong types)."""


async def run_here(function: Callable[..., Any], *args: Any, size: int = 0) -> Any:
    """``function(*args)`` on the event loop: replaces ``off_loop`` where there is no engine."""
    return function(*args)


class BodyLimits:
    """The limits of one server. ``off_loop`` runs a function in a thread (:meth:`EngineClient.off_loop`)."""

    def __init__(self, server: ServerSettings, off_loop: Callable[..., Awaitable[Any]] = run_here) -> None:
        self.held = 0  # bytes of the bodies of running requests
        self._most_held = max(server.max_held_body_bytes, server.max_body_bytes)  # at least one body is accepted
        scale = max(1.0, server.max_body_bytes / DEFAULT_BODY)
        self._most_items, self._most_nodes = int(MAX_ITEMS * scale), int(MAX_NODES * scale)
        self._off_loop = off_loop
        self._cleaning: asyncio.Task[None] | None = None

    def account(self) -> Callable[[int], None]:
        """Returns a function that counts bytes as held until the end of the current task, which handles the request.

        The function raises RequestError 503 when all bodies together are too large; small bodies are always accepted.
        """
        taken = 0

        def take(size: int) -> None:
            nonlocal taken
            if taken + size > SMALL_BODY and self.held + size > self._most_held:
                raise RequestError(
                    f"The bodies of all running requests have {self.held} bytes, and this one has no room in the limit "
                    f"of {self._most_held} (--max-held-body-bytes); send it again later.",
                    status=503,
                    retry_after=1.0,
                )
            taken += size
            self.held += size

        def release(_: Any) -> None:
            self.held -= taken
            if taken > LARGE_BODY and (self._cleaning is None or self._cleaning.done()):
                self._cleaning = asyncio.get_running_loop().create_task(self._clean())

        task = asyncio.current_task()
        assert task is not None
        task.add_done_callback(release)
        return take

    async def _clean(self) -> None:
        with suppress(RuntimeError):  # the thread pool is shut down
            await self._off_loop(give_memory_back, size=LARGE_BODY)

    async def decode(self, body: bytes, kind: type[S]) -> S:
        """Decode JSON as ``kind``. InvalidBody when it doesn't fit, or has more values than the limits allow."""
        if len(body) <= SMALL_BODY:
            return decode(body, kind)
        found: S = await self._off_loop(self._decode_large, body, kind, size=len(body))
        return found

    def _decode_large(self, body: bytes, kind: type[S]) -> S:
        shape = measure(body)
        for count, most, what in (
            (shape.items, self._most_items, "values"),
            (shape.nodes, self._most_nodes, "arrays, objects and strings"),
        ):
            if count > most:
                raise InvalidBody(
                    f"The body has {count} {what}; at most {most} are allowed. Split the request. (The limit grows in "
                    f"proportion where --max-body-bytes is above {DEFAULT_BODY}.)"
                )
        if shape.depth > MAX_DEPTH:
            raise InvalidBody(TOO_DEEP)
        return decode(body, kind)


def decode(body: bytes, kind: type[S]) -> S:
    """JSON as ``kind``, with lax coercion of scalars; unknown fields are ignored."""
    try:
        value = msgspec.json.decode(body, type=kind, strict=False)
    except RecursionError:
        raise InvalidBody(TOO_DEEP) from None
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise InvalidBody(str(error) if body else "The body is missing: a JSON object is required.") from None
    if len(body) <= SMALL_BODY and too_deep(body):
        raise InvalidBody(TOO_DEEP)
    return value
