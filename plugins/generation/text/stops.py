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
    longest = max((len(stop) for stop in stops), default=0)
    for length in range(min(longest - 1, len(text)), 0, -1):
        tail = text[-length:]
        if any(stop.startswith(tail) for stop in stops):
            return length
    return 0
