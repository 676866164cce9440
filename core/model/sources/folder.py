"""Checks the files in a checkpoint's folder before any is opened."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from trunkline.core.errors import ModelError

MAX_ENTRIES = 10_000  # limit on entries that are checked; checkpoints have fewer


def check_folder(folder: Path) -> None:
    """ModelError when the folder, or a folder directly in it (a module's), contains a pipe, a socket or a device.

    Opening one of these may block forever. Symbolic links are followed; broken ones are skipped.
    """
    for number, entry in enumerate(_entries(folder)):
        if number == MAX_ENTRIES:
            return
        try:
            mode = entry.stat().st_mode
        except OSError:
            continue
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise ModelError(f"{entry.path} is a pipe, a socket or a device, not a file, and is not opened.")


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    """The entries of the folder and of the folders directly in it."""
    for entry in _listed(folder):
        yield entry
        yield from _listed(Path(entry.path))


def _listed(folder: Path) -> list[os.DirEntry[str]]:
    """The entries of a folder; [] if it isn't a folder or can't be listed."""
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError:
        return []
