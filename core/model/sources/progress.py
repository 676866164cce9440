"""Shows the progress of long downloads and conversions: a bar on a terminal, log lines elsewhere."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

ProgressCallback = Callable[[str, int, int], None]
"""Called repeatedly with (description of the step, bytes done, bytes in total); total 0 if it isn't known."""

_log = logging.getLogger("trunkline.model")


@contextmanager
def console_progress(title: str) -> Iterator[ProgressCallback]:
    """A progress bar on stderr if that is a terminal, else one log line per step."""
    if not sys.stderr.isatty():
        yield _log_progress(title)
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    with Bars(*columns, console=Console(stderr=True)) as bars:
        task = bars.add_task(title)

        def report(what: str, done: int, total: int) -> None:
            bars.update(task, description=f"{title}: {what}", completed=done, total=total or None)

        yield report


def _log_progress(title: str) -> ProgressCallback:
    said = ""

    def report(what: str, done: int, total: int) -> None:
        nonlocal said
        if what != said:
            said = what
            _log.info("%s: %s%s", title, what, f" ({total / 1e6:.0f} MB)" if total else "")

    return report
