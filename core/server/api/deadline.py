"""A time limit for foreign Python code, such as chat templates, which may loop forever."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager

TEMPLATE_SECONDS = 5.0
"""Time limit for rendering a chat template, which is a program of the checkpoint's author on input from clients."""


class TookTooLong(Exception):
    """Raised in a thread, between two bytecodes, when its time limit is exceeded."""


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Raise :class:`TookTooLong` in this thread unless the block ends within ``seconds``.

    A call into C isn't interrupted: the exception is raised after it.
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
        with lock:  # fire() does nothing from here on
            over = True
        timer.cancel()
