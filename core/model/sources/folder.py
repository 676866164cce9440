"""Checks a checkpoint's folder before any of its files is opened."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from trunkline.core.errors import ModelError

MANY = 10_000  # entries that are looked at; no checkpoint has as many


def check_folder(folder: Path) -> None:
    """ModelError when the folder or one directly in it (a module's) holds a pipe, a socket or a device.

    Whoever opens one of these may wait for ever. A link counts as what it leads to, and one that leads nowhere
    as nothing.
    """
    for number, entry in enumerate(_entries(folder)):
        if number == MANY:
            return
        try:
            mode = entry.stat().st_mode
        except OSError:
            continue
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise ModelError(f"{entry.path} is a pipe, a socket or a device, not a file, and is not opened.")


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    """What is in the folder and in the folders in it."""
    for entry in _listed(folder):
        yield entry
        yield from _listed(Path(entry.path))


def _listed(folder: Path) -> list[os.DirEntry[str]]:
    """Nothing for what is no folder or can't be listed."""
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError:
        return []
