"""Threads for the work of grammars, and queues with a limit before them."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor


class Lane:
    """Threads that run jobs in order of arrival. At most ``limit`` jobs wait."""

    def __init__(self, name: str, threads: int, limit: int) -> None:
        self._threads = ThreadPoolExecutor(threads, name, lower_priority)
        self._limit = threads + limit
        self._jobs = 0  # waiting and running
        self._lock = threading.Lock()

    def submit(self, job: Callable[[], None]) -> bool:
        """Run the job in a thread. False if too many jobs wait, or after :meth:`close`."""

        def run() -> None:
            try:
                job()
            finally:
                with self._lock:
                    self._jobs -= 1

        with self._lock:
            if self._jobs >= self._limit:
                return False
            try:
                self._threads.submit(run)
            except RuntimeError:  # it is closed
                return False
            self._jobs += 1
        return True

    def close(self) -> None:
        """Forget the jobs that wait."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def lower_priority() -> None:
    """Let other threads run before the calling one, where the system can say that of a thread (Linux)."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
