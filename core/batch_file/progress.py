"""Shows how far a run is: a bar on a terminal, elsewhere ten lines."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from .answers import AnswerFile

PARTS = 10  # lines where there is no terminal


class RunRate:
    """The rate of a run and the time that is left. Answers of earlier runs don't count for the rate."""

    def __init__(self, answers: AnswerFile, total: int, now: Callable[[], float] = time.monotonic) -> None:
        self._answers, self._total, self._now = answers, total, now
        self._before, self._began = len(answers), now()

    @property
    def rate(self) -> float:
        """Answers per second of this run."""
        return (len(self._answers) - self._before) / max(self._now() - self._began, 1e-9)

    def __str__(self) -> str:
        rate = self.rate
        text = f"{rate:.1f}/s"
        if rate:
            left = round((self._total - len(self._answers)) / rate)
            text += f", {left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"
        return f"{text}, {self._answers.failed} failed" if self._answers.failed else text


@contextmanager
def show_progress(answers: AnswerFile, total: int, stream: TextIO | None = None) -> Iterator[Callable[[], None]]:
    """Yields a function to call after each answer. ``total``: lines of the file of requests."""
    stream = sys.stderr if stream is None else stream
    pace = RunRate(answers, total)
    if not stream.isatty():
        yield _lines(answers, total, pace, stream)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[pace]}"))
    with Progress(*columns, console=Console(file=stream)) as bars:
        task = bars.add_task("", total=total, completed=len(answers), pace="")
        yield lambda: bars.update(task, completed=len(answers), pace=str(pace))


def _lines(answers: AnswerFile, total: int, pace: RunRate, stream: TextIO) -> Callable[[], None]:
    shown = len(answers) * PARTS // max(total, 1)

    def report() -> None:
        nonlocal shown
        part = len(answers) * PARTS // max(total, 1)
        if part > shown:
            shown = part
            print(f"{len(answers)} of {total} ({pace})", file=stream, flush=True)

    return report
