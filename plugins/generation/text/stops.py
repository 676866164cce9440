"""Stop strings: where a text ends, and what of it must wait until it is clear that it doesn't."""

from __future__ import annotations

from collections.abc import Sequence


def find_stop(text: str, stops: Sequence[str], start: int = 0) -> tuple[int, str] | None:
    """The earliest stop string at or after ``start``: its position and itself.

    Of two that begin at the same place the one listed first wins.
    """
    found: tuple[int, str] | None = None
    for stop in stops:
        at = text.find(stop, start, None if found is None else found[0] + len(stop) - 1)
        if at >= 0:
            found = (at, stop)
    return found


def held_back(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end of ``text`` could be the beginning of a stop string."""
    longest = max((len(stop) for stop in stops), default=0)
    for length in range(min(longest - 1, len(text)), 0, -1):
        tail = text[-length:]
        if any(stop.startswith(tail) for stop in stops):
            return length
    return 0
