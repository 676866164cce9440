"""Patterns with a limit on the time of a search."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import regex

from trunkline.core.errors import RequestError

PATTERN_SECONDS = 0.25  # limit on one search; linear patterns take microseconds


class TooSlow(RequestError):
    """A pattern exceeded its time limit on the model's output."""

    def __init__(self) -> None:
        super().__init__(
            f"A pattern of the model's response_template took more than {PATTERN_SECONDS:g} s on its output; "
            "--tool-call-parser and --reasoning-parser choose other formats."
        )


class BoundedPattern:
    """The part of a compiled pattern that transformers' parser uses, with a time limit. Raises TooSlow."""

    def __init__(self, pattern: regex.Pattern[str]) -> None:
        self._pattern = pattern
        self.pattern = pattern.pattern
        self.groupindex = pattern.groupindex

    def search(
        self, text: str, position: int = 0, partial: bool = False, end: int = sys.maxsize
    ) -> regex.Match[str] | None:
        """The first match from ``position`` on, before ``end``."""
        try:
            return self._pattern.search(text, position, end, partial=partial, timeout=PATTERN_SECONDS)
        except TimeoutError:
            raise TooSlow from None

    def finditer(self, text: str) -> Iterator[regex.Match[str]]:
        """All matches."""
        try:
            yield from self._pattern.finditer(text, timeout=PATTERN_SECONDS)
        except TimeoutError:
            raise TooSlow from None
