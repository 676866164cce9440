"""Threads for the CPU work of requests: tokenising, chat templates, large bodies and answers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

SHORT_THREADS = 2  # with one, a slow chat template would block the tokenisation of all other requests
LONG_WORK = 1 << 15  # characters or bytes, about 10 ms of tokenising; larger work goes to the long thread


class WorkThreads:
    """Two threads for short work and a third one for long work, which therefore never blocks short work."""

    def __init__(self) -> None:
        self.short = ThreadPoolExecutor(SHORT_THREADS, thread_name_prefix="trunkline-front")
        self.long = ThreadPoolExecutor(1, thread_name_prefix="trunkline-front-long")

    async def run(self, function: Callable[..., Any], *args: Any, size: int = 0) -> Any:
        """Run ``function(*args)`` in a thread. ``size``: number of characters or bytes that it processes."""
        executor = self.long if size > LONG_WORK else self.short
        return await asyncio.get_running_loop().run_in_executor(executor, function, *args)

    def close(self) -> None:
        for executor in (self.short, self.long):
            executor.shutdown(wait=False, cancel_futures=True)
