"""Stop strings: finds them in a text, and the end of a text that may be the beginning of one."""

from __future__ import annotations

from collections.abc import Sequence


def find_stop(text: str, stops: Sequence[str], start: int = 0) -> tuple[int, str] | None:
    """Position and text of the earliest stop string that begins at or after ``start``; None if there is none.

    Of two that begin at the same position, the one that is listed first is returned.
    """
    earliest: tuple[int, str] | None = None
    for stop in stops:
        position = text.find(stop, start, None if earliest is None else earliest[0] + len(stop) - 1)
        if position >= 0:
            earliest = (position, stop)
    return earliest


def partial_stop_length(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of ``text`` that is the beginning of a stop string, but not a whole one."""
    return max((_partial_length(text, stop) for stop in stops), default=0)


def _partial_length(text: str, stop: str) -> int:
    start = text.find(stop[0], max(0, len(text) - len(stop) + 1))
    while start >= 0:
        if stop.startswith(text[start:]):
            return len(text) - start
        start = text.find(stop[0], start + 1)
    return 0
