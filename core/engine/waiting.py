"""The requests that wait for slots, and the order in which they get them."""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from trunkline.core.cache.ledger import Holding

_WINDOW = 64  # how many of the first in line are compared by cached prefix
_SHARED = 32  # tokens; a shorter common prefix isn't worth waiting for


@dataclass(slots=True, eq=False)
class Entry(Holding):
    """What the scheduler knows of one request (``Request.schedule``): its slots, and its place in line."""

    order: int = 0  # of arrival
    deadline: int = 0  # count of admissions from which on nobody overtakes it; 0 = nobody ever
    running: bool = False
    cached: int = 0  # last probe of the cache …
    probed: int = -1  # … and the cache version that it is true for


def sort_running(running: Sequence[Entry]) -> tuple[list[Entry], list[Entry]]:
    """Decoding requests and those with prompt to compute, both in order of admission."""
    decoding: list[Entry] = []
    prefilling: list[Entry] = []
    for entry in running:
        request = entry.request
        known = len(request.tokens)
        missing = known - request.computed
        if missing == 1 and known > request.prompt_len:
            decoding.append(entry)
        elif missing:
            prefilling.append(entry)
    return decoding, prefilling


class WaitingQueue:
    """Priority first (higher number earlier), then retracted requests, then the policy.

    ``lpm``: longest cached prefix first; a request that was overtaken for too long comes before
    all of that, so nothing starves. ``fcfs``: in order of arrival.
    """

    def __init__(self, policy: str, patience: int) -> None:
        """``patience``: how many admissions a request may lose to later ones under ``lpm``."""
        self._by_prefix = policy == "lpm"
        self._patience = patience
        self._entries: list[Entry] = []  # sorted by _line
        self._admissions = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries)

    def add(self, entry: Entry) -> None:
        """A new request."""
        entry.deadline = self._admissions + len(self._entries) + self._patience
        insort(self._entries, entry, key=_line)

    def put_back(self, entry: Entry) -> None:
        """A retracted request: ahead of all others of its priority."""
        entry.deadline = 0
        insort(self._entries, entry, key=_line)

    def admit(self, entry: Entry) -> None:
        """It got its room."""
        self._admissions += 1
        self._entries.remove(entry)

    def remove(self, entry: Entry) -> None:
        """It left without."""
        self._entries.remove(entry)

    def candidates(self, probe: Callable[[Entry], int]) -> list[Entry]:
        """The first in line, best first. ``probe`` tells an entry's cached prefix length."""
        first = self._entries[:_WINDOW]
        if self._by_prefix and len(first) > 1:
            first.sort(key=lambda entry: self._rank(entry, probe))
        return first

    def _rank(self, entry: Entry, probe: Callable[[Entry], int]) -> tuple[int, int, int, int]:
        aged = entry.deadline <= self._admissions
        return (-entry.request.priority, not aged, 0 if aged else -probe(entry), entry.order)


def _line(entry: Entry) -> tuple[int, bool, int]:
    return (-entry.request.priority, entry.deadline != 0, entry.order)


class InFlight:
    """Prefixes that running requests are about to compute, so that others can wait for them."""

    def __init__(self) -> None:
        self._next: dict[tuple[bytes, int, bytes], Holding] = {}

    def add(self, holding: Holding) -> None:
        """A request with uncomputed prompt."""
        request = holding.request
        start, end = request.computed, request.computed + _SHARED
        if request.cacheable and end <= len(request.tokens):
            tokens = holding.tokens(end)
            self._next[holding.namespace, start, tokens[start:].tobytes()] = holding

    def covers(self, holding: Holding, cached: int) -> bool:
        """Will the next pass lengthen this waiting request's cached prefix by a good deal?"""
        end = cached + _SHARED
        if not self._next or end > holding.reusable():
            return False
        tokens = holding.tokens(end)
        other = self._next.get((holding.namespace, cached, tokens[cached:].tobytes()))
        return other is not None and tokens.tobytes() == other.tokens(end).tobytes()
