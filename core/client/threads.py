"""Threads for the CPU work of requests: tokenising, chat templates, large bodies and answers."""

from __future__ import annotations

import asyncio
import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

SHORT_THREADS = 2  # so that one slow template doesn't hold up everybody's tokenising
LONG_WORK = 1 << 15  # characters or bytes; some 10 ms of tokenising


class WorkThreads:
    """Short work shares two threads. Long work has one of its own, so that it never holds up short work."""

    def __init__(self) -> None:
        self.short = ThreadPoolExecutor(SHORT_THREADS, thread_name_prefix="trunkline-front")
        self.long = ThreadPoolExecutor(1, thread_name_prefix="trunkline-front-long")

    async def run(self, function: Callable[..., Any], *args: Any, size: int = 0) -> Any:
        """``function(*args)`` in a thread; ``size``: the characters or bytes that it works on."""
        executor = self.long if size > LONG_WORK else self.short
        return await asyncio.get_running_loop().run_in_executor(executor, function, *args)

    def close(self) -> None:
        for executor in (self.short, self.long):
            executor.shutdown(wait=False, cancel_futures=True)


def give_memory_back() -> None:
    """Have the C library return freed memory to the system: after millions of small blocks it keeps most of it."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it
    if trim is not None:
        trim(0)
