"""The file of answers: what an earlier run has written is read, and answers are appended."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from trunkline.core.errors import ConfigError, TrunklineError

from .lines import UNREADABLE
from .schemas import PREFIX, BatchAnswer

BEGINNING = b'{"id":"' + PREFIX.encode()  # of each line


class AnswerFile:
    """A file of answers, open for appending. Each line is written at once, so that a reader sees whole lines.

    ``answered``: the ids of the requests with a response; ``invalid``: the numbers of lines that are no requests;
    ``failed``: the number of answers with an error or a status of 400 or more.
    """

    def __init__(self, path: Path) -> None:
        """Read what is there; a last line that was cut off is removed.

        ConfigError for a file that isn't one of answers, which is left as it is, and one that can't be opened.
        """
        self.path = path
        self.answered: set[str] = set()
        self.invalid: set[int] = set()
        self.failed = 0
        try:
            end = self._read()
            self._file = path.open("ab", buffering=0)
            if end < os.fstat(self._file.fileno()).st_size:
                self._file.truncate(end)
        except OSError as error:
            raise ConfigError(f"Can't write answers to {path}: {error.strerror or error}.") from error

    def __len__(self) -> int:
        """Number of answers in the file."""
        return len(self.answered) + len(self.invalid)

    def append(self, answer: BatchAnswer) -> None:
        """Write an answer. TrunklineError if that fails."""
        self._count(answer)
        line = memoryview(msgspec.json.encode(answer) + b"\n")
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            raise TrunklineError(f"Can't write to {self.path}: {error.strerror or error}.") from error

    def __enter__(self) -> AnswerFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _read(self) -> int:
        """Count the answers in the file; the position after its last whole line."""
        if not self.path.exists():
            return 0
        with self.path.open("rb") as file:
            return sum(self._read_line(line, number) for number, line in enumerate(file, 1))

    def _read_line(self, line: bytes, number: int) -> int:
        """The length of a whole line, whose answer is counted, or 0 for one that was cut off."""
        if line.endswith(b"\n"):
            try:
                self._count(msgspec.json.decode(line, type=BatchAnswer))
                return len(line)
            except UNREADABLE:
                pass
        elif line.startswith(BEGINNING) or BEGINNING.startswith(line):
            return 0
        raise ConfigError(
            f"{self.path}, line {number}, isn't an answer of an earlier run. Choose another file with --output, or "
            "remove this one."
        )

    def _count(self, answer: BatchAnswer) -> None:
        self.failed += answer.failed
        if answer.error is not None:
            self.invalid.add(answer.error.line)
        elif answer.custom_id is not None:
            self.answered.add(answer.custom_id)
