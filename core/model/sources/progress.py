"""Shows the progress of long downloads and conversions: a bar on a terminal, log lines elsewhere."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, done, total): bytes, or total 0 for what can't be counted.

Called again and again with the same words while the work goes on.
"""

_log = logging.getLogger("trunkline.model")


@contextmanager
def console_progress(title: str) -> Iterator[Progress]:
    """A rich bar on stderr when that is a terminal, else one log line for each thing begun."""
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


def _log_progress(title: str) -> Progress:
    said = ""

    def report(what: str, done: int, total: int) -> None:
        nonlocal said
        if what != said:
            said = what
            _log.info("%s: %s%s", title, what, f" ({total / 1e6:.0f} MB)" if total else "")

    return report
