"""Compiled kernels: the folder in which they are kept, and reports of compilations by Triton.

Triton compiles a kernel when it is launched for the first time, which takes seconds. So all that serving needs is
launched at start-up, and a kernel that is compiled later is a defect, which is logged.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger(__name__)
Report = Callable[[str, float], None]
"""Called with the name of a kernel that was compiled, or read from the folder, and how long that took in seconds."""

_folder: list[Path] = []  # the folder, or empty; see keep_in
_reports: list[Report] = []  # of the start-ups in progress


def keep_in(folder: Path | None) -> None:
    """Keep compiled kernels in ``folder`` from now on; None, the default, keeps none.

    The folder is created with mode 0700. A folder that other users can access, or that belongs to
    another user, isn't used; a warning is logged.
    """
    _folder.clear()
    if folder is None:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = folder.stat()
    except OSError as error:
        logger.warning("compiled kernels aren't cached: %s", error)
        return
    if status.st_uid != os.getuid() or status.st_mode & 0o077:
        logger.warning("compiled kernels aren't cached: no other user may have access to %s (chmod 700)", folder)
        return
    _folder.append(folder)


def folder() -> Path | None:
    """The folder of :func:`keep_in`, None if there is none."""
    return _folder[0] if _folder else None


@contextmanager
def expected(report: Report) -> Iterator[None]:
    """Models are loaded: kernels may be compiled, and ``report`` is called for each."""
    _reports.append(report)
    try:
        yield
    finally:
        _reports.remove(report)


def note(name: str, seconds: float) -> None:
    """The kernel ``name`` was compiled in ``seconds``, or read from the folder: called by those who compile."""
    for report in _reports:
        report(name, seconds)
    if not _reports:
        logger.error(
            "the kernel %s was compiled while serving: requests waited for %.1f s. This is a defect: please report it",
            name,
            seconds,
        )
