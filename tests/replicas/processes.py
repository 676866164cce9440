"""The processes of Ray on this machine."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

WAIT = 30  # seconds in which they end


@contextmanager
def ends_all() -> Iterator[None]:
    """AssertionError unless all processes of Ray that the block starts have ended soon after it."""
    before = _of_ray()
    yield
    deadline = time.monotonic() + WAIT
    while left := _of_ray() - before:
        assert time.monotonic() < deadline, [psutil.Process(pid).cmdline() for pid in left if psutil.pid_exists(pid)]
        time.sleep(0.2)


def _of_ray() -> set[int]:
    found = set()
    for process in psutil.process_iter(["name", "cmdline"]):
        command = " ".join(process.info["cmdline"] or [process.info["name"]])
        if command.startswith("ray::") or "/ray/core/src/ray/" in command or "/ray/dashboard/" in command:
            found.add(process.pid)
    return found
