"""Reads messages and writes answers, on a terminal or through pipes; for ``trunkline chat``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TextIO

from .conversation import Delta

PROMPT, CONTINUED = "> ", ". "
QUOTES = '"""'  # a line of these begins and ends a message of several lines
DIM, PLAIN = "\x1b[2m", "\x1b[0m"


def read_message(read: Callable[[str], str]) -> str:
    r"""The next message: a line; lines that end with ``\`` and the one after them; or the lines between two ``\"""``.

    ``read(prompt)`` returns a line without its line feed; EOFError when there is none, which is passed on unless a
    message has begun.
    """
    line = read(PROMPT)
    lines = []
    try:
        if line.strip() == QUOTES:
            while (line := read(CONTINUED)).strip() != QUOTES:
                lines.append(line)
            return "\n".join(lines)
        while line.endswith("\\"):
            lines.append(line[:-1])
            line = read(CONTINUED)
    except EOFError:
        return "\n".join(lines)
    return "\n".join([*lines, line]).strip()


class AnswerWriter:
    """Writes an answer as it arrives. On a terminal, reasoning is dimmed; elsewhere it is left out."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._terminal = stream.isatty()
        self._escapes = self._terminal and not _is_dumb(stream)
        self._reasoning = False
        self.began = False  # something was written

    def write(self, delta: Delta) -> None:
        """Write a part."""
        if delta.reasoning and not self._terminal:
            return
        self._change(delta.reasoning)
        self.began = True
        self._stream.write(_printable(delta.text) if self._terminal else delta.text)
        self._stream.flush()

    def end(self) -> None:
        """End the line."""
        if self._reasoning and self._escapes:
            self._stream.write(PLAIN)
        self._stream.write("\n")
        self._stream.flush()

    def _change(self, reasoning: bool) -> None:
        """Begin or end the reasoning, if this part does."""
        if reasoning == self._reasoning:
            return
        self._reasoning = reasoning
        if self._escapes:
            self._stream.write(DIM if reasoning else PLAIN)
        if not reasoning:
            self._stream.write("\n")


def _is_dumb(stream: TextIO) -> bool:
    """Whether a terminal has no escape sequences."""
    from rich.console import Console

    return Console(file=stream).is_dumb_terminal


def _printable(text: str) -> str:
    """``text`` without control characters, so that the output of a model can't control the terminal."""
    return "".join(character for character in text if character in "\n\t" or character.isprintable())
