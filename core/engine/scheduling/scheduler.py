"""Decides what each forward pass computes: continuous batching with chunked prefill.

One batch mixes decoding requests (one token each) and chunks of prompts under a token budget.

Liveness: every pass computes at least one token of the running request that was admitted first, and that
request is never retracted. So it ends, and then the same holds for the next one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from trunkline.core.cache.ledger import Ledger, regime_of
from trunkline.core.cache.pool import SlotPool, SlotTable
from trunkline.core.cache.radix import RadixCache
from trunkline.core.types import Request

from .batch import Batch, Draft, Row
from .waiting import Entry, InFlight, WaitingQueue, retraction_cost, sort_running

_MAX_EXPECTED_NEW = 4096  # tokens; at admission, a larger limit on new tokens is reduced to this

# Most requests end before their limit on new tokens. So only a share of these tokens is reserved at admission,
# the new-token ratio (as in SGLang): it falls with each pass and rises with each retraction.
_RATIO_START = 0.5
_RATIO_MIN = 0.1
_RATIO_DECAY = 0.99  # factor per pass
_RATIO_RISE = 2.0  # factor per retraction


class Scheduler:
    """The requests of one model: which of them run, in which order, and with which slots. Not thread-safe.

    ``chunk`` is the token budget of a pass. With None, prompts are computed whole, as many as the pool
    holds (models with bidirectional attention). Decoding requests are in every batch; at least a quarter
    of the budget is left for prompts. ``max_running``: limit on running requests. ``policy``:
    see :class:`.WaitingQueue`. ``boundaries``: see :attr:`boundaries`.
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
    ) -> None:
        self.boundaries = boundaries  # lengths in tokens; a longer sequence is recomputed with other rotary frequencies
        self.max_request_tokens = min(pool.capacity, table.max_len)
        self._capacity = pool.capacity
        self._ledger = Ledger(pool, table, radix)
        self._chunk = chunk
        self._max_running = max_running
        self.queue = WaitingQueue(policy, max_overtakes=2 * max_running)
        self._running: list[Entry] = []  # in order of admission
        self._arrivals = 0
        self._new_token_ratio = _RATIO_START

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
        waiting = list(self.queue)
        for entry in waiting:
            entry.regime, entry.cached_version = regime_of(len(entry.request.tokens), boundaries), -1
        return [entry.request for entry in (*self._running, *waiting)]

    def add(self, request: Request) -> None:
        """Queue a request. ValueError unless it has 1 to ``max_request_tokens`` tokens; callers check that before."""
        if not 0 < len(request.tokens) <= self.max_request_tokens:
            raise ValueError(f"a request has 1 to {self.max_request_tokens} tokens, not {len(request.tokens)}")
        entry = Entry(request, np.array(request.tokens, dtype=np.int32), order=self._arrivals)
        entry.regime = regime_of(len(request.tokens), self.boundaries)
        request.schedule = entry
        self._arrivals += 1
        self.queue.add(entry)

    def finish(self, request: Request) -> None:
        """Remove a request, whether it waits or runs; its computed tokens stay in the prefix cache.

        Called between two passes. Does nothing for a request that isn't here.
        """
        entry: Entry | None = request.schedule
        if entry is None:
            return
        request.schedule = None
        if entry.running:
            self._running.remove(entry)
            self._ledger.close(entry)
        else:
            self.queue.remove(entry)

    def plan(self) -> Batch | None:
        """The batch of the next forward pass; its slots are allocated and in the slot table.

        None only if no request waits or runs. If the last batch wasn't committed, its tokens are
        planned again.
        """
        draft = Draft(budget=self._capacity)
        self._new_token_ratio = max(_RATIO_MIN, self._new_token_ratio * _RATIO_DECAY)
        if self.boundaries:
            self._requeue_past_boundary(draft)
        decoding, prefilling = sort_running(self._running)
        while self._slots_left(draft) < len(decoding) and self._retract(draft):
            decoding, prefilling = sort_running(self._running)
        for entry in decoding:
            draft.add(entry, len(entry.request.tokens))
        decodes = len(decoding)
        if self._chunk is not None:
            draft.budget = max(self._chunk - decodes, self._chunk // 4, 1)
        self._continue_prompts(draft, prefilling)
        while prefilling and not draft.entries and self._retract(draft):
            _, prefilling = sort_running(self._running)
            self._continue_prompts(draft, prefilling)
        if not draft.retracted:
            self._admit(draft)
        return self._allocate(draft, decodes)

    def commit(self, batch: Batch) -> None:
        """Mark the batch's tokens as computed, and insert computed prompts into the prefix cache."""
        for row in batch.rows[: batch.decodes]:
            row.request.computed = row.end
        for row in batch.rows[batch.decodes :]:
            entry: Entry | None = row.request.schedule
            if entry is not None:  # None: aborted after this pass was planned
                row.request.computed = row.end
                self._ledger.store(entry)

    # -- steps of plan ---------------------------------------------------------------------------

    def _requeue_past_boundary(self, draft: Draft) -> None:
        """Queue requests again whose length has exceeded a boundary: their keys have the old rotary frequencies.

        This happens at most once per request and boundary, so the oldest request still ends.
        """
        for entry in tuple(self._running):
            if entry.regime != regime_of(len(entry.request.tokens), self.boundaries):
                self._requeue(entry)
                draft.restarted.append(entry.request)

    def _slots_left(self, draft: Draft) -> int:
        """Slots that can be allocated beyond those that the draft takes."""
        return self._ledger.available - draft.slots

    def _continue_prompts(self, draft: Draft, prefilling: list[Entry]) -> None:
        for entry in prefilling:
            self._add_chunk(draft, entry)

    def _add_chunk(self, draft: Draft, entry: Entry) -> None:
        """Add as much of the prompt as the token budget and free slots allow; without chunking, all or nothing."""
        request = entry.request
        missing = len(request.tokens) - request.computed
        allocated = entry.allocated - request.computed  # slots left from a pass that failed
        count = min(missing, draft.budget, allocated + self._slots_left(draft))
        if count > 0 and (self._chunk is not None or count == missing):
            draft.budget -= count
            draft.add(entry, request.computed + count)

    def _retract(self, draft: Draft) -> bool:
        """Free the slots of the cheapest running request and queue it again; False when only one runs.

        Cheapest means: lowest priority, then fewest tokens to recompute, then admitted last. Never the
        request that was admitted first.
        """
        if len(self._running) < 2:
            return False
        victim = min(reversed(self._running[1:]), key=retraction_cost)
        self._requeue(victim)
        self._new_token_ratio = min(1.0, self._new_token_ratio * _RATIO_RISE)
        draft.retracted.append(victim.request)
        return True

    def _requeue(self, entry: Entry) -> None:
        """Move a running request back to the queue, before others of its priority, with nothing computed."""
        self._running.remove(entry)
        self._ledger.close(entry)
        entry.regime, entry.cached_version = regime_of(len(entry.request.tokens), self.boundaries), -1
        entry.request.computed = 0
        entry.running = False
        self.queue.requeue(entry)

    def _admit(self, draft: Draft) -> None:
        """Start waiting requests in the queue's order, while token budget, ``max_running`` and slots allow.

        Stops at the first request that doesn't fit; if smaller ones overtook it, large requests could starve.
        """
        if not self.queue or draft.budget <= 0 or len(self._running) >= self._max_running:
            return
        reserved = sum([self._reserve(entry) for entry in self._running])
        if self._running and reserved >= self._ledger.available:
            return
        in_flight = self._prompts_in_flight()
        for entry in self.queue.candidates(self._cached_length):
            if draft.budget <= 0 or len(self._running) >= self._max_running:
                return
            if in_flight.covers(entry, self._cached_length(entry)):
                continue
            if not self._start(entry, reserved):
                return
            request = entry.request
            if not request.started:
                request.started, request.cached = time.monotonic(), request.computed
                draft.started.append(request)
            reserved += self._reserve(entry)
            in_flight.add(entry)
            self._add_chunk(draft, entry)

    def _start(self, entry: Entry, reserved: int) -> bool:
        """Move a waiting request to the running ones, if there are slots for it beside the ``reserved`` ones."""
        first = not self._running  # then it fits: every cached prefix can be evicted
        if not first and reserved + self._reserve(entry) - self._cached_length(entry) > self._ledger.available:
            return False
        if not self._ledger.open(entry):
            return False
        # Locking its prefix may have made slots unavailable.
        if not first and reserved + self._reserve(entry) > self._ledger.available:
            self._ledger.close(entry)
            entry.request.computed = 0
            return False
        self.queue.admit(entry)
        self._running.append(entry)
        entry.running = True
        return True

    def _reserve(self, entry: Entry) -> int:
        """Slots to reserve for a request: for its known tokens, and for a share of its new tokens."""
        request = entry.request
        known = len(request.tokens)
        new = min(request.needs.new_tokens - known + request.prompt_len, _MAX_EXPECTED_NEW)
        return known - entry.allocated + max(0, int(new * self._new_token_ratio))

    def _cached_length(self, entry: Entry) -> int:
        """The length of the request's cached prefix, in tokens; computed again when the cache has changed."""
        version = self._ledger.version
        if entry.cached_version != version:
            entry.cached, entry.cached_version = self._ledger.cached_length(entry), version
        return entry.cached

    def _prompts_in_flight(self) -> InFlight:
        in_flight = InFlight()
        if self._ledger.caches:
            for entry in self._running:
                in_flight.add(entry)
        return in_flight

    def _allocate(self, draft: Draft, decodes: int) -> Batch | None:
        if not draft.entries:
            return None
        entries = draft.entries
        rows = [
            Row(entry.request, entry.request.computed, end, entry.row)
            for entry, end in zip(entries, draft.ends, strict=True)
        ]
        self._ledger.grow(entries, draft.ends)
        return Batch(rows, decodes, draft.started, [*draft.restarted, *draft.retracted])
