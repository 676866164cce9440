"""Follows several replies at once, for streams."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

from trunkline.core.types import Reply


async def as_updated(replies: Sequence[Reply]) -> AsyncIterator[int]:
    """Indices of replies with new messages, in the order of the messages, until all replies have ended.

    Several messages that arrive before the caller asks for the next index are one update. A reply's last index comes
    when it has ended.
    """
    updated: dict[int, None] = {}  # an ordered set
    any_updated = asyncio.Event()

    async def watch(index: int) -> None:
        ended = False
        while not ended:
            await replies[index].wait()
            ended = _has_ended(replies[index])
            updated[index] = None
            any_updated.set()

    watchers = [asyncio.create_task(watch(index)) for index in range(len(replies))]
    unfinished = set(range(len(replies)))
    try:
        while unfinished:
            await any_updated.wait()
            any_updated.clear()
            while updated:
                index = next(iter(updated))
                del updated[index]
                if index not in unfinished:
                    continue  # the update before included the end
                if _has_ended(replies[index]):
                    unfinished.discard(index)
                yield index
    finally:
        for watcher in watchers:
            watcher.cancel()


def _has_ended(reply: Reply) -> bool:
    return reply.finish is not None or reply.error is not None
