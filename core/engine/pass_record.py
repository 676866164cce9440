"""Records which requests the engine is processing, in shared memory that the front can read after the engine died.

The engine writes the keys of a batch before its forward pass, and the key of a submission or call before it is
handled.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from array import array
from collections.abc import Sequence
from typing import IO

CAPACITY = 8191  # keys; of a larger batch only the first ones are recorded
BYTES = 8 * (CAPACITY + 1)


class PassRecord:
    """Layout: int64 words, first the number of keys, then the keys."""

    def __init__(self, file: int = -1) -> None:
        """``file``: descriptor of a :func:`shared_file`; -1 = private memory."""
        self._words = memoryview(mmap.mmap(file, BYTES)).cast("q")

    def note(self, keys: Sequence[int]) -> None:
        """Record that the engine is processing these requests, and no others."""
        noted = array("q", keys[:CAPACITY])
        words = self._words
        words[0] = 0  # if the process dies while it writes the keys, the record is empty
        words[1 : len(noted) + 1] = noted
        words[0] = len(noted)

    def keys(self) -> list[int]:
        """The keys that were recorded last."""
        return self._words[1 : self._words[0] + 1].tolist()


def shared_file() -> IO[bytes]:
    """A new anonymous file for a record. Its mappings remain valid when it is closed."""
    file: IO[bytes]
    if hasattr(os, "memfd_create"):
        file = os.fdopen(os.memfd_create("trunkline-pass"), "r+b")
    else:
        file = tempfile.TemporaryFile()  # noqa: SIM115 (the caller closes it)
    file.truncate(BYTES)
    return file
