"""Records which requests the engine works on, in memory that outlives its process.

The engine notes their keys before each forward pass, and the key of a request or call before it is handled. When
the engine is lost, whatever it died of, the front reads what it worked on.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from array import array
from collections.abc import Sequence
from typing import IO

CAPACITY = 8191  # keys; a pass over more requests is noted in part
BYTES = 8 * (CAPACITY + 1)


class PassRecord:
    """Layout: int64 words, first the number of keys, then the keys."""

    def __init__(self, file: int = -1) -> None:
        """``file``: descriptor of a :func:`shared_file`; -1 = memory of this process only."""
        self._words = memoryview(mmap.mmap(file, BYTES)).cast("q")

    def note(self, keys: Sequence[int]) -> None:
        """From now on these are worked on, and no others."""
        noted = array("q", keys[:CAPACITY])
        words = self._words
        words[0] = 0  # a death in here leaves no count of half-written keys
        words[1 : len(noted) + 1] = noted
        words[0] = len(noted)

    def keys(self) -> list[int]:
        """What was noted last."""
        return self._words[1 : self._words[0] + 1].tolist()


def shared_file() -> IO[bytes]:
    """A new file for a record, without a name; mappings of it stay when it is closed."""
    file: IO[bytes]
    if hasattr(os, "memfd_create"):
        file = os.fdopen(os.memfd_create("trunkline-pass"), "r+b")
    else:
        file = tempfile.TemporaryFile()  # noqa: SIM115 (the caller closes it)
    file.truncate(BYTES)
    return file
