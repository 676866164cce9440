"""Returns freed memory to the operating system."""

from __future__ import annotations

import ctypes


def give_memory_back() -> None:
    """Make glibc return freed memory, most of which it would keep after many allocations."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries don't have it
    if trim is not None:
        trim(0)
