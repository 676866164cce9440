"""Decides what each forward pass computes: continuous batching with chunked prefill.

One batch mixes decoding requests (one token each) and chunks of prompts under a token budget.
Liveness: every pass computes at least one token of the request that was admitted first, and
that one is never retracted, so it ends; then the next one is first.
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
from .waiting import Entry, InFlight, WaitingQueue, sort_running

_EXPECTED_NEW = 4096  # tokens; nobody's limit on new tokens counts for more at admission
_SHARE_START = 0.5  # of the new tokens that a request may add, this much is set aside …
_SHARE_FLOOR = 0.1
_SHARE_DECAY = 0.99  # … less with every pass that went well …
_SHARE_RISE = 2.0  # … and more after each retraction


class Scheduler:
    """Requests, their slots and their order, for one model. Not thread-safe.

    ``chunk`` is the token budget of a pass; None: prompts are computed whole (models that look
    both ways), as many as the pool holds. Decoding requests always take part, and leave prompts
    a quarter of the chunk at least. ``boundaries``: see :attr:`boundaries`.
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
        self.boundaries = boundaries  # lengths in tokens beyond which a sequence must be computed anew
        self.max_request_tokens = min(pool.capacity, table.max_len)
        self._capacity = pool.capacity
        self._ledger = Ledger(pool, table, radix)
        self._chunk = chunk
        self._max_running = max_running
        self._waiting = WaitingQueue(policy, patience=2 * max_running)
        self._running: list[Entry] = []  # in order of admission
        self._arrivals = 0
        self._share = _SHARE_START

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def idle(self) -> bool:
        return not self._running and not self._waiting

    def free_slots(self) -> int:
        """Slots that new tokens could take now, at the cost of cached prefixes."""
        return self._ledger.available

    def holds(self, request: Request) -> bool:
        """Does it wait or run here?"""
        return request.schedule is not None

    def flush(self, *, paused: bool = False) -> bool:
        """Forget all cached prefixes; False (and nothing happens) when anything runs, or waits unless ``paused``."""
        if self._running or not (paused or self.idle):
            return False
        self._ledger.reset()
        return True

    def retract(self, chosen: Callable[[Request], bool]) -> list[Request]:
        """Queue the ``chosen`` running requests again, all of them if need be: only for lanes that are paused."""
        victims = [entry for entry in self._running if chosen(entry.request)]
        for entry in victims:
            self._requeue(entry)
        return [entry.request for entry in victims]

    def renew(self, boundaries: Sequence[int]) -> list[Request]:
        """Other weights: forget all cached prefixes. All requests, those that run first.

        Waiting ones have their regime by the new ``boundaries``. Running ones keep their slots and neither use nor
        fill the cache any more, as theirs are keys of both weights.
        """
        self.boundaries = boundaries
        for entry in self._running:
            entry.request.cacheable = False
        self._ledger.forget()
        waiting = list(self._waiting)
        for entry in waiting:
            entry.regime, entry.probed = regime_of(len(entry.request.tokens), boundaries), -1
        return [entry.request for entry in (*self._running, *waiting)]

    def add(self, request: Request) -> None:
        """Queue a request. The caller has checked it against ``max_request_tokens``."""
        if not 0 < len(request.tokens) <= self.max_request_tokens:
            raise ValueError(f"a request has 1 to {self.max_request_tokens} tokens, not {len(request.tokens)}")
        entry = Entry(request, np.array(request.tokens, dtype=np.int32), order=self._arrivals)
        entry.regime = regime_of(len(request.tokens), self.boundaries)
        request.schedule = entry
        self._arrivals += 1
        self._waiting.add(entry)

    def finish(self, request: Request) -> None:
        """Take a request out, whatever its state, between two passes; what it computed stays cached.

        Harmless for a request that isn't here.
        """
        entry: Entry | None = request.schedule
        if entry is None:
            return
        request.schedule = None
        if entry.running:
            self._running.remove(entry)
            self._ledger.close(entry)
        else:
            self._waiting.remove(entry)

    def plan(self) -> Batch | None:
        """The next forward pass, its slots allocated and in the table.

        None when nothing can run; then nothing waits or runs. The same work is planned again
        when the last batch wasn't committed.
        """
        draft = Draft(budget=self._capacity)
        self._share = max(_SHARE_FLOOR, self._share * _SHARE_DECAY)
        if self.boundaries:
            self._restart_outgrown(draft)
        decoding, prefilling = sort_running(self._running)
        while self._room(draft) < len(decoding) and self._retract(draft):
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
        """The pass succeeded: its tokens are computed, and prompts may be shared from now on."""
        for row in batch.rows[: batch.decodes]:
            row.request.computed = row.end
        for row in batch.rows[batch.decodes :]:
            entry: Entry | None = row.request.schedule
            if entry is not None:  # None: its caller gave it up after this pass was planned
                row.request.computed = row.end
                self._ledger.store(entry)

    # -- steps of plan ---------------------------------------------------------------------------

    def _restart_outgrown(self, draft: Draft) -> None:
        """Queue requests again whose length has crossed a boundary: their keys are of the regime before it.

        This happens once per boundary and request, so that the first request still ends.
        """
        for entry in tuple(self._running):
            if entry.regime != regime_of(len(entry.request.tokens), self.boundaries):
                self._requeue(entry)
                draft.restarted.append(entry.request)

    def _room(self, draft: Draft) -> int:
        return self._ledger.available - draft.slots

    def _continue_prompts(self, draft: Draft, prefilling: list[Entry]) -> None:
        for entry in prefilling:
            self._add_chunk(draft, entry)

    def _add_chunk(self, draft: Draft, entry: Entry) -> None:
        """As much of the prompt as budget and room allow: maybe nothing; all or nothing without chunks."""
        request = entry.request
        missing = len(request.tokens) - request.computed
        allocated = entry.allocated - request.computed  # left from a pass that failed
        take = min(missing, draft.budget, allocated + self._room(draft))
        if take > 0 and (self._chunk is not None or take == missing):
            draft.budget -= take
            draft.add(entry, request.computed + take)

    def _retract(self, draft: Draft) -> bool:
        """Queue the cheapest running request again and free its slots; False when only one runs.

        Cheapest: lowest priority, then least to compute again, then latest. Never the first.
        """
        if len(self._running) < 2:
            return False
        victim = min(reversed(self._running[1:]), key=_loss)
        self._requeue(victim)
        self._share = min(1.0, self._share * _SHARE_RISE)
        draft.retracted.append(victim.request)
        return True

    def _requeue(self, entry: Entry) -> None:
        """Make a running request a waiting one that has computed nothing, ahead of others of its priority."""
        self._running.remove(entry)
        self._ledger.close(entry)
        entry.regime, entry.probed = regime_of(len(entry.request.tokens), self.boundaries), -1
        entry.request.computed = 0
        entry.running = False
        self._waiting.put_back(entry)

    def _admit(self, draft: Draft) -> None:
        """Start waiting requests as long as budget, places and slots last, in the queue's order.

        The first that doesn't fit ends it: passing it by would let large requests starve.
        """
        if not self._waiting or draft.budget <= 0 or len(self._running) >= self._max_running:
            return
        reserved = sum([self._reserve(entry) for entry in self._running])
        if self._running and reserved >= self._ledger.available:
            return
        in_flight = self._prompts_in_flight()
        for entry in self._waiting.candidates(self._probe):
            if draft.budget <= 0 or len(self._running) >= self._max_running:
                return
            if in_flight.covers(entry, self._probe(entry)):
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
        """Make a waiting request a running one, if its slots and those set aside for others are there."""
        alone = not self._running  # then it fits, whatever the cache holds
        if not alone and reserved + self._reserve(entry) - self._probe(entry) > self._ledger.available:
            return False
        if not self._ledger.open(entry):
            return False
        if not alone and reserved + self._reserve(entry) > self._ledger.available:  # its prefix is locked now
            self._ledger.close(entry)
            entry.request.computed = 0
            return False
        self._waiting.admit(entry)
        self._running.append(entry)
        entry.running = True
        return True

    def _reserve(self, entry: Entry) -> int:
        """Slots to set aside for a request: known tokens, and a share of those it may add."""
        request = entry.request
        known = len(request.tokens)
        new = min(request.needs.new_tokens - known + request.prompt_len, _EXPECTED_NEW)
        return known - entry.allocated + max(0, int(new * self._share))

    def _probe(self, entry: Entry) -> int:
        version = self._ledger.version
        if entry.probed != version:
            entry.cached, entry.probed = self._ledger.probe(entry), version
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


def _loss(entry: Entry) -> tuple[int, int]:
    """What a retraction costs: the request's priority, and the tokens to compute again."""
    request = entry.request
    return request.priority, request.computed - request.cached
