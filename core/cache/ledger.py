"""Which slots each running request holds; the only place where slots change owner.

A slot is free (owned by the slot pool), cached (owned by the radix tree) or private to one request.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trunkline.core.types import Request

from .pool import SlotPool, SlotTable
from .radix import Node, RadixCache


@dataclass(slots=True, eq=False)
class SlotAllocation:
    """The slots of one request, in its row of the slot table::

    position   0 ............ held ............ allocated ............ max_len
    slots      | cached: owned  | private to     | stale: not           |
               | by the tree,   | the request    | this request's       |
               | locked at node |                |                      |
    """

    request: Request
    ids: np.ndarray  # int32: a prefix of the request's tokens, extended when more are needed as an array
    regime: int = 0  # see regime_of; keys of one regime can't be used in another
    row: int = -1  # of the slot table; -1 = none, and no slots
    node: Node | None = None
    held: int = 0
    allocated: int = 0

    @property
    def namespace(self) -> bytes:
        """The key of the cached prefixes that it may use: those of the same weights, salt and rotary regime."""
        return bytes([self.regime]) + self.request.namespace

    def tokens(self, end: int) -> np.ndarray:
        """The request's tokens ``[0, end)``, int32."""
        known = len(self.ids)
        if known < end:
            self.ids = np.concatenate([self.ids, np.array(self.request.tokens[known:], dtype=np.int32)])
        return self.ids[:end]

    def reusable(self) -> int:
        """How many tokens may come from the cache. Never the last one: its hidden row must be computed."""
        if not self.request.cacheable:
            return 0
        cap = self.request.needs.reuse_up_to
        longest = len(self.request.tokens) - 1
        return longest if cap is None else min(cap, longest)


def regime_of(length: int, boundaries: Sequence[int]) -> int:
    """The rotary regime of a sequence of ``length`` tokens: how many of the sorted ``boundaries`` it exceeds.

    Each regime has rotary frequencies of its own (LongRoPE); see :mod:`trunkline.core.model.rotary`.
    """
    return bisect_left(boundaries, length)


class Ledger:
    """Moves slots between the pool, the radix tree and the requests."""

    def __init__(self, pool: SlotPool, table: SlotTable, radix: RadixCache | None) -> None:
        self._pool = pool
        self._table = table
        self._radix = radix
        self._released: list[np.ndarray] = []  # slots that a batch in flight may still use

    @property
    def available(self) -> int:
        """Slots that can be allocated now: free ones and cached ones that can be evicted."""
        return self._pool.free + (self._radix.evictable if self._radix else 0)

    @property
    def caches(self) -> bool:
        """Whether there is a prefix cache."""
        return self._radix is not None

    @property
    def version(self) -> int:
        """A number that changes whenever results of :meth:`cached_length` may change."""
        return self._radix.version if self._radix else 0

    def cached_length(self, allocation: SlotAllocation) -> int:
        """How many tokens :meth:`open` would find in the cache. Changes nothing."""
        reusable = allocation.reusable()
        if self._radix is None or reusable == 0:
            return 0
        return self._radix.match_length(allocation.namespace, allocation.tokens(reusable))

    def open(self, allocation: SlotAllocation) -> bool:
        """Assign a table row to the request, and lock its cached prefix, which then counts as computed.

        False, and nothing changes, if the table has no free row.
        """
        row = self._table.take()
        if row is None:
            return False
        allocation.row = row
        reusable = allocation.reusable()
        if self._radix is not None and reusable > 0:
            match = self._radix.match(allocation.namespace, allocation.tokens(reusable))
            self._radix.lock(match.node)
            self._table.write(row, 0, match.slots)
            allocation.node, allocation.held = match.node, match.length
        allocation.request.computed = allocation.allocated = allocation.held
        return True

    def grow(self, allocations: Sequence[SlotAllocation], ends: Sequence[int]) -> None:
        """Allocate private slots so that each allocation reaches its end, evicting as needed.

        The sum must be available. An allocation that reaches its end already stays as it is.
        """
        rows: list[int] = []  # single tokens, most of a decode pass, are written in one operation
        columns: list[int] = []
        ranges: list[tuple[int, int, int]] = []
        for allocation, end in zip(allocations, ends, strict=True):
            start = allocation.allocated
            if end == start + 1:
                rows.append(allocation.row)
                columns.append(start)
            elif end > start:
                ranges.append((allocation.row, start, end))
            allocation.allocated = max(start, end)
        singles = len(rows)
        slots = self._allocate(singles + sum([end - start for _, start, end in ranges]))
        if singles:
            self._table.write_each(rows, columns, slots[:singles])
        at = singles
        for row, start, end in ranges:
            self._table.write(row, start, slots[at : at + end - start])
            at += end - start

    def store(self, allocation: SlotAllocation, *, in_flight: bool = False) -> None:
        """Insert the computed tokens into the tree, and lock them there.

        ``in_flight``: a batch that uses the request's slots is in flight: those that it loses are free after
        :meth:`settle`.
        """
        request, radix = allocation.request, self._radix
        end = request.computed
        if radix is None or not request.cacheable or end <= allocation.held:
            return
        tokens, slots = allocation.tokens(end), self._table.slots[allocation.row, :end]
        inserted = radix.insert(allocation.namespace, tokens, slots)
        radix.lock(inserted.node)
        radix.unlock(allocation.node)
        if inserted.existing > allocation.held:
            # Another request has inserted the same tokens: use its slots, free ours.
            overlap = slice(allocation.held, inserted.existing)
            duplicates = slots[overlap].copy()
            theirs = radix.match(allocation.namespace, tokens).slots[overlap]
            self._table.write(allocation.row, allocation.held, theirs)
            if in_flight:
                self._released.append(duplicates)
            else:
                self._pool.release(duplicates)
        allocation.node, allocation.held = inserted.node, end

    def settle(self) -> None:
        """Free the slots that were replaced while a batch was in flight, which is collected now."""
        for slots in self._released:
            self._pool.release(slots)
        self._released.clear()

    def close(self, allocation: SlotAllocation) -> None:
        """Insert the computed tokens into the tree, unlocked, and free all other slots and the table row."""
        self.store(allocation)
        self._pool.release(self._table.slots[allocation.row, allocation.held : allocation.allocated])
        if self._radix is not None:
            self._radix.unlock(allocation.node)
        self._table.give(allocation.row)
        allocation.row, allocation.node, allocation.held, allocation.allocated = -1, None, 0, 0

    def reset(self) -> None:
        """Empty the tree and free its slots. AssertionError while a request holds any."""
        self.settle()
        if self._radix is not None:
            self._pool.release(self._radix.reset())

    def forget(self) -> None:
        """Empty the tree, but for what is held: that is evicted once it is let go."""
        if self._radix is not None:
            self._pool.release(self._radix.evict(self._radix.evictable))

    def _allocate(self, count: int) -> np.ndarray:
        if count > self._pool.free and self._radix is not None:
            self._pool.release(self._radix.evict(count - self._pool.free))
        slots = self._pool.allocate(count)
        if slots is None:
            raise AssertionError(f"{count} slots were planned, {self._pool.free} are free")
        return slots
