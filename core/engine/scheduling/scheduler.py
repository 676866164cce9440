"""Decides what each forward pass computes: continuous batching with chunked prefill.

One batch mixes decoding requests (one token each) and chunks of prompts under a token budget. While requests decode,
the budget is bounded by the time that the pass will take, and prompts share it: those with few tokens left first.

Liveness: every pass computes at least one token of the running request that was admitted first, and that
request is never retracted. So it ends, and then the same holds for the next one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence

import numpy as np

from trunkline.core.cache.ledger import Ledger, regime_of
from trunkline.core.cache.pool import SlotPool, SlotTable
from trunkline.core.cache.radix import RadixCache
from trunkline.core.types import Request

from .batch import Batch, BatchDraft
from .pace import Pace
from .reserve import Reserve
from .row import Row
from .waiting import Entry, InFlight, WaitingQueue, launch, retraction_cost, sort_running


class Scheduler:
    """The requests of one model: which of them run, in which order, and with which slots. Not thread-safe.

    ``chunk`` is the token budget of a pass. With None, prompts are computed whole, as many as the pool holds
    (models with bidirectional attention). Decoding requests are in every batch; at least a quarter of the budget
    is left for prompts, whose chunks ``pace`` bounds by their time. ``max_running``: limit on running requests.
    ``policy``: see :class:`.WaitingQueue`. ``boundaries``: see :attr:`boundaries`.
    """

    def __init__(
        self,
        pool: SlotPool,
        table: SlotTable,
        radix: RadixCache | None,
        *,
        chunk: int | None,
        max_running: int,
        policy: str,
        boundaries: Sequence[int] = (),
        pace: Pace | None = None,
    ) -> None:
        self.boundaries = boundaries  # lengths in tokens; a longer sequence is recomputed with other rotary frequencies
        self.max_request_tokens = min(pool.capacity, table.max_len)
        self._capacity = pool.capacity
        self._ledger = Ledger(pool, table, radix)
        self._chunk, self._max_running = chunk, max_running
        self.queue = WaitingQueue(policy, max_overtakes=2 * max_running)
        self._running: list[Entry] = []  # in order of admission
        self._arrivals = 0
        self._ending = 0  # requests that have ended, whose slots are used by a batch in flight
        self.reserve = Reserve()
        self.pace = pace

    @property
    def waiting(self) -> int:
        return len(self.queue)

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def idle(self) -> bool:
        return not self._running and not self.queue

    def free_slots(self) -> int:
        """Slots that can be allocated now: free ones, and those of cached prefixes that no request uses."""
        return self._ledger.available

    def holds(self, request: Request) -> bool:
        """Whether the request waits or runs here."""
        return request.schedule is not None

    def flush(self, *, paused: bool = False) -> bool:
        """Drop all cached prefixes. False, and nothing is dropped, while a request runs, or waits unless ``paused``."""
        if self._running or not (paused or self.idle):
            return False
        self._ledger.reset()
        return True

    def retract(self, selects: Callable[[Request], bool]) -> list[Request]:
        """Queue the selected running requests again, possibly all of them. Returns them. For paused lanes only."""
        selected = [entry for entry in self._running if selects(entry.request)]
        for entry in selected:
            self._requeue(entry)
        return [entry.request for entry in selected]

    def start_epoch(self, boundaries: Sequence[int]) -> list[Request]:
        """Called after a weight update. Empties the prefix cache, and returns all requests, running ones first.

        Running requests keep their slots, but their keys (of old and new weights) don't get into the cache.
        """
        self.boundaries = boundaries
        for entry in self._running:
            entry.request.cacheable = False
        self._ledger.forget()
        for entry in self.queue:
            entry.regime, entry.cached_version = regime_of(len(entry.request.tokens), boundaries), -1
        return [entry.request for entry in (*self._running, *self.queue)]

    def add(self, request: Request) -> None:
        """Queue a request. ValueError unless it has 1 to ``max_request_tokens`` tokens; callers check that before."""
        if not 0 < len(request.tokens) <= self.max_request_tokens:
            raise ValueError(f"a request has 1 to {self.max_request_tokens} tokens, not {len(request.tokens)}")
        entry = Entry(request, np.array(request.tokens, dtype=np.int32), order=self._arrivals)
        entry.regime = regime_of(len(request.tokens), self.boundaries)
        request.schedule = entry
        self._arrivals += 1
        self.queue.add(entry)

    def finish(self, request: Request) -> bool:
        """Remove a request, whether it waits or runs; its computed tokens stay in the prefix cache.

        False if its slots are freed later, because a batch in flight uses them. Does nothing for one that isn't here.
        """
        entry: Entry | None = request.schedule
        if entry is None:
            return True
        request.schedule = None
        if not entry.running:
            self.queue.remove(entry)
            return True
        self._running.remove(entry)
        if entry.in_flight:
            entry.ended = True
            self._ending += 1
            return False
        self._ledger.close(entry)
        return True

    @property
    def delay(self) -> float | None:
        """Seconds that other models may delay requests that decode; fewer if prompts do, too. None: no limit."""
        decoding, prefilling, _ = sort_running(self._running)
        seconds = self.pace.delay if self.pace is not None and decoding else None
        return seconds / 2 if seconds is not None and (prefilling or self.queue) else seconds

    def plan(self, *, ahead: bool = False, beside: Sequence[Scheduler] = ()) -> Batch | None:
        """The batch of the next forward pass; its slots are allocated and in the slot table.

        Every batch must be committed or cancelled. None means that no request waits or runs; ``ahead``, while one
        batch is in flight, also that the next one depends on its results. ``beside``: other models that have work.
        """
        if not ahead:
            self._ledger.settle()
        draft = BatchDraft(self._ledger, self._chunk is None, budget=self._capacity)
        self.reserve.lower()
        if self.boundaries:
            if ahead:
                return None  # the tokens that are awaited may take a sequence past one
            self._requeue_past_boundary(draft)
        decoding, prefilling, needed = sort_running(self._running)
        if ahead and draft.slots_left < needed:
            return None
        while draft.slots_left < needed and self._retract(draft):
            decoding, prefilling, needed = sort_running(self._running)
        for entry in decoding:
            draft.add(entry, entry.length)
        decodes = len(decoding)
        if self._chunk is not None:
            draft.budget = max(self._chunk - decodes, self._chunk // 4, 1)
            if decodes and self.pace is not None:
                if not draft.retracted:
                    prefilling += self._admit(draft, whole_queue=True)
                draft.budget = self.pace.tokens(draft.budget, decodes, len(prefilling), models=1 + len(beside))
                draft.add_shares(prefilling)
                return self._allocate(draft, decodes)
        if beside and self.pace is not None:
            draft.budget = self.pace.tokens_beside([other.delay for other in beside], draft.budget)
        draft.add_chunks(prefilling)
        while not ahead and not draft.ends and self._retract(draft):
            decoding, prefilling, _ = sort_running(self._running)
            decodes = draft.add_chunks(decoding)  # they rested
            draft.add_chunks(prefilling)
        if not draft.retracted:
            self._admit(draft)
        return self._allocate(draft, decodes)

    def commit(self, batch: Batch, failed: Collection[int] = ()) -> None:
        """Mark the batch's tokens as computed and cache computed prompts, but for the requests ``failed``, by key."""
        self._ledger.settle()
        for index, (row, entry) in enumerate(zip(batch.rows, batch.entries, strict=True)):
            if not entry.ended and row.request.key not in failed:
                row.request.computed = row.end
                if index >= batch.decodes:
                    self._ledger.store(entry, in_flight=entry.in_flight > 1)
            self._leave(row, entry)

    def cancel(self, batch: Batch) -> None:
        """The batch's results aren't used: its tokens are planned again."""
        for row, entry in zip(batch.rows, batch.entries, strict=True):
            entry.launched = row.start
            self._leave(row, entry)

    def _leave(self, row: Row, entry: Entry) -> None:
        """A pass is no longer in flight: free the slots of a request that ended meanwhile."""
        entry.in_flight -= 1
        entry.awaited -= row.awaited
        if entry.ended and not entry.in_flight:
            self._ending -= 1
            self._ledger.close(entry)

    # -- steps of plan ---------------------------------------------------------------------------

    def _requeue_past_boundary(self, draft: BatchDraft) -> None:
        """Queue requests that exceeded a boundary, once for each: their keys have the old rotary frequencies."""
        for entry in tuple(self._running):
            if entry.regime != regime_of(len(entry.request.tokens), self.boundaries):
                self._requeue(entry)
                draft.restarted.append(entry.request)

    def _retract(self, draft: BatchDraft) -> bool:
        """Free the slots of the cheapest running request and queue it again; False when only one runs.

        Cheapest: lowest priority, then fewest tokens to recompute, then admitted last. Never the one admitted first.
        """
        if len(self._running) < 2:
            return False
        victim = min(reversed(self._running[1:]), key=retraction_cost)
        self._requeue(victim)
        self.reserve.rise()
        draft.retracted.append(victim.request)
        return True

    def _requeue(self, entry: Entry) -> None:
        """Move a running request back to the queue, before others of its priority, with nothing computed."""
        self._running.remove(entry)
        self._ledger.close(entry)
        entry.regime, entry.cached_version = regime_of(len(entry.request.tokens), self.boundaries), -1
        entry.request.computed = entry.launched = 0
        entry.running = False
        self.queue.requeue(entry)

    def _admit(self, draft: BatchDraft, *, whole_queue: bool = False) -> list[Entry]:
        """Start waiting requests in the queue's order, while token budget, ``max_running`` and slots allow.

        Stops at the first request that doesn't fit; if smaller ones overtook it, large requests could starve.
        With ``whole_queue``, the budget doesn't matter, and no chunks are added. Returns what was started.
        """
        started: list[Entry] = []
        if not self.queue or draft.budget <= 0 or len(self._running) >= self._max_running:
            return started
        reserved = sum([self.reserve.slots(entry) for entry in self._running])
        if self._running and reserved >= self._ledger.available:
            return started
        in_flight = InFlight(self._running if self._ledger.caches else ())
        for entry in self.queue.candidates(self._ledger):
            if draft.budget <= 0 or len(self._running) >= self._max_running:
                break
            if in_flight.covers(entry, entry.cached_length(self._ledger)):
                continue
            if not self._start(entry, reserved):
                break
            started.append(entry)
            request = entry.request
            if not request.started:
                request.started, request.cached = time.monotonic(), request.computed
                draft.started.append(request)
            reserved += self.reserve.slots(entry)
            in_flight.add(entry)
            if not whole_queue:
                draft.add_chunks([entry])
        return started

    def _start(self, entry: Entry, reserved: int) -> bool:
        """Move a waiting request to the running ones, if there are slots for it beside the ``reserved`` ones."""
        first = not self._running and not self._ending  # then it fits: every cached prefix can be evicted
        if (
            not first
            and reserved + self.reserve.slots(entry) - entry.cached_length(self._ledger) > self._ledger.available
        ):
            return False
        if not self._ledger.open(entry):
            return False
        # Locking its prefix may have made slots unavailable.
        if not first and reserved + self.reserve.slots(entry) > self._ledger.available:
            self._ledger.close(entry)
            entry.request.computed = 0
            return False
        entry.launched = entry.request.computed
        self.queue.admit(entry)
        self._running.append(entry)
        entry.running = True
        return True

    def _allocate(self, draft: BatchDraft, decodes: int) -> Batch | None:
        if not draft.ends:
            return None
        entries = list(draft.ends)
        self._ledger.grow(entries, list(draft.ends.values()))
        rows = [launch(entry, end) for entry, end in draft.ends.items()]
        return Batch(rows, entries, decodes, draft.started, [*draft.restarted, *draft.retracted])
