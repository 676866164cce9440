"""Shows the phases of the engine's start-up: log lines, and on a terminal a bar for phases with steps."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING

from trunkline.core.engine.messages import Loading

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

log = logging.getLogger("trunkline.supervisor")


class LoadingDisplay:
    """The display of one start of the engine."""

    def __init__(self) -> None:
        self._bars: Progress | None = None
        self._task: TaskID | None = None

    def show(self, phase: Loading) -> None:
        """A phase begins, or goes on."""
        if not phase.steps or not sys.stderr.isatty():
            if not phase.done:
                log.info("engine: %s", phase.what)
            return
        if phase.done == phase.steps:
            self.close()
        elif self._bars is None or self._task is None:
            self._begin(phase)
        else:
            self._bars.update(self._task, completed=phase.done, refresh=True)

    def close(self) -> None:
        """Remove the bar."""
        if self._bars is not None:
            self._bars.stop()
        self._bars = self._task = None

    def _begin(self, phase: Loading) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bars = Progress(*columns, console=Console(stderr=True), transient=True)
        self._task = self._bars.add_task(phase.what, total=phase.steps, completed=phase.done)
        self._bars.start()
