"""The queue of requests that wait to run, and the order in which they start."""

from __future__ import annotations

import time
from bisect import insort
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from trunkline.core.cache.ledger import Ledger, SlotAllocation
from trunkline.core.cache.radix import common_prefix

from .row import Row

REST_SECONDS = 0.005  # after a second batch without a result, in a row; it doubles with each one …
MAX_DOUBLINGS = 6  # … so often
_LPM_WINDOW = 64  # requests at the head of the queue that are ordered by cached prefix
_MIN_SHARED = 32  # tokens; for a shorter common prefix, waiting doesn't pay


@dataclass(slots=True, eq=False)
class Entry(SlotAllocation):
    """The scheduler's state of one request (``Request.schedule``): its slots, and its position in the queue."""

    order: int = 0  # number in order of arrival
    deadline: int = 0  # number of admissions after which no other request overtakes it; 0 = none ever does
    running: bool = False
    cached: int = 0  # length of its cached prefix, in tokens …
    cached_version: int = -1  # … in this version of the cache
    launched: int = 0  # tokens [0, launched) are computed, or are in a pass that is in flight
    awaited: int = 0  # tokens that passes in flight will give, and later ones may take as input
    in_flight: int = 0  # number of such passes
    ended: bool = False  # its slots are freed when no pass uses them any more
    rests: int = 0  # how many batches in a row gave no result for it …
    rests_for: int = 0  # … at this length
    rests_until: float = 0.0  # by time.monotonic()

    @property
    def length(self) -> int:
        """Number of tokens, those that are awaited included."""
        return len(self.request.tokens) + self.awaited

    def cached_length(self, ledger: Ledger) -> int:
        """The length of its cached prefix, in tokens; computed again when the cache has changed."""
        if self.cached_version != ledger.version:
            self.cached, self.cached_version = ledger.cached_length(self), ledger.version
        return self.cached

    def rest(self) -> None:
        """Leave the request out of batches for a while, since one gave no result for it."""
        self.rests = self.rests + 1 if self.rests_for == self.length else 1
        self.rests_for = self.length
        self.rests_until = time.monotonic() + REST_SECONDS * ((1 << min(self.rests - 1, MAX_DOUBLINGS)) - 1)


def sort_running(running: Sequence[Entry]) -> tuple[list[Entry], list[Entry], int]:
    """Decoding requests, those with prompt to compute, both in order of admission, and how many slots are needed:
    one for each decoding request, and one for the prompt of the request that was admitted first.

    Requests that rest are left out, unless all do.
    """
    decoding: list[Entry] = []
    prefilling: list[Entry] = []
    now = time.monotonic() if any(entry.rests for entry in running) else 0.0
    for entry in [entry for entry in running if entry.rests_until <= now] or running:
        length = len(entry.request.tokens) + entry.awaited
        missing = length - entry.launched
        if missing == 1 and length > entry.request.prompt_len:
            decoding.append(entry)
        elif missing:
            prefilling.append(entry)
    first_lacks_slot = bool(prefilling) and prefilling[0] is running[0] and running[0].allocated <= running[0].launched
    return decoding, prefilling, len(decoding) + first_lacks_slot


def launch(entry: Entry, end: int) -> Row:
    """The row that computes a request's tokens up to ``end``."""
    needs, length = entry.request.needs, entry.length
    final = end == length
    more = length + 1 - entry.request.prompt_len < needs.new_tokens  # tokens may follow the one that it gives
    row = Row(entry.request, entry.launched, end, entry.row, final, awaited=final and more and not needs.lockstep)
    entry.launched = end
    entry.in_flight += 1
    entry.awaited += row.awaited
    return row


def retraction_cost(entry: Entry) -> tuple[int, int]:
    """The order in which requests are retracted: priority, then the number of tokens to recompute."""
    request = entry.request
    return request.priority, request.computed - request.cached


class WaitingQueue:
    """Ordered by priority (higher first), then retracted requests first, then by the policy.

    ``fcfs``: in order of arrival. ``lpm``: longest cached prefix first. Under ``lpm``, a request that has
    been overtaken too often comes before the others of its priority, so that none starves.
    """

    def __init__(self, policy: str, max_overtakes: int) -> None:
        """``max_overtakes``: how many later requests may be admitted before a request under ``lpm``."""
        self._by_prefix = policy == "lpm"
        self._max_overtakes = max_overtakes
        self._entries: list[Entry] = []  # sorted by _queue_order
        self._admissions = 0
        self.retracted = 0  # of the requests, how many ran before
        self.tokens = 0  # of all requests

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries)

    def add(self, entry: Entry) -> None:
        """Queue a new request."""
        entry.deadline = self._admissions + len(self._entries) + self._max_overtakes
        self.tokens += len(entry.request.tokens)
        insort(self._entries, entry, key=_queue_order)

    def requeue(self, entry: Entry) -> None:
        """Queue a retracted request, before all others of its priority."""
        entry.deadline = 0
        self.retracted += 1
        self.tokens += len(entry.request.tokens)
        insort(self._entries, entry, key=_queue_order)

    def admit(self, entry: Entry) -> None:
        """Remove a request that starts to run."""
        self._admissions += 1
        self.remove(entry)

    def remove(self, entry: Entry) -> None:
        """Remove a request."""
        self._entries.remove(entry)
        self.tokens -= len(entry.request.tokens)
        self.retracted -= entry.deadline == 0

    def candidates(self, ledger: Ledger) -> list[Entry]:
        """The requests to start next, in order."""
        first = self._entries[:_LPM_WINDOW]
        if self._by_prefix and len(first) > 1:
            first.sort(key=lambda entry: self._rank(entry, ledger))
        return first

    def _rank(self, entry: Entry, ledger: Ledger) -> tuple[int, int, int, int]:
        aged = entry.deadline <= self._admissions
        return (-entry.request.priority, not aged, 0 if aged else -entry.cached_length(ledger), entry.order)


def _queue_order(entry: Entry) -> tuple[int, bool, int]:
    return (-entry.request.priority, entry.deadline != 0, entry.order)


class InFlight:
    """Prompts that running requests compute, so that other requests with the same beginning can wait for them."""

    def __init__(self, running: Iterable[SlotAllocation] = ()) -> None:
        self._prompts: dict[tuple[bytes, bytes], list[SlotAllocation]] = {}  # by namespace and first tokens
        for each in running:
            self.add(each)

    def add(self, allocation: SlotAllocation) -> None:
        """Add a running request; without effect unless it has a prompt to compute that may be shared."""
        request = allocation.request
        known = len(request.tokens)
        if request.cacheable and known >= _MIN_SHARED and request.computed + 1 < known:
            first = allocation.tokens(_MIN_SHARED).tobytes()
            self._prompts.setdefault((allocation.namespace, first), []).append(allocation)

    def covers(self, allocation: SlotAllocation, cached: int) -> bool:
        """Whether the next passes will add tokens to this waiting request's cached prefix.

        ``cached``: the prefix's length now, in tokens.
        """
        reusable = allocation.reusable()
        if not self._prompts or reusable < _MIN_SHARED or reusable <= cached:
            return False
        tokens = allocation.tokens(reusable)
        for other in self._prompts.get((allocation.namespace, tokens[:_MIN_SHARED].tobytes()), ()):
            shared = common_prefix(other.tokens(len(other.request.tokens)), tokens)
            if shared > max(cached, other.request.computed):
                return True
        return False
