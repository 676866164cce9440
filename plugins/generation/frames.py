"""Following several replies at once, in the order in which news arrives."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

from trunkline.core.types import Reply


async def arrivals(replies: Sequence[Reply]) -> AsyncIterator[int]:
    """Indices of replies that have news, until all are over; each is named last when it is over.

    Whoever reads slowly gets an index once for many steps: at most one entry a reply is kept.
    """
    ready: dict[int, None] = {}
    news = asyncio.Event()

    async def watch(index: int) -> None:
        over = False
        while not over:
            await replies[index].wait()
            over = _over(replies[index])
            ready[index] = None
            news.set()

    watchers = [asyncio.create_task(watch(index)) for index in range(len(replies))]
    unfinished = set(range(len(replies)))
    try:
        while unfinished:
            await news.wait()
            news.clear()
            while ready:
                index = next(iter(ready))  # the one that has waited longest
                del ready[index]
                if index not in unfinished:
                    continue  # its last news was taken together with the one before
                if _over(replies[index]):
                    unfinished.discard(index)
                yield index
    finally:
        for watcher in watchers:
            watcher.cancel()


def _over(reply: Reply) -> bool:
    return reply.finish is not None or reply.error is not None
