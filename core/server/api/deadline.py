"""A time limit for Python code of others, such as chat templates, which may loop forever."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager

TEMPLATE_SECONDS = 5.0
"""Time limit for one chat template: a program of the checkpoint's author, fed with what clients send."""


class TookTooLong(Exception):
    """Raised in a thread whose time is up, between two bytecodes."""


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Raise :class:`TookTooLong` in this thread unless the block ends in time.

    One long call into C isn't interrupted, only what comes after it.
    """
    thread, lock, over = ctypes.c_ulong(threading.get_ident()), threading.Lock(), False

    def fire() -> None:
        with lock:
            if not over:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, ctypes.py_object(TookTooLong))

    timer = threading.Timer(seconds, fire)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        with lock:  # from here on it can't fire any more
            over = True
        timer.cancel()
