"""Which slots each running request holds; the only place where slots change owner.

A slot is free (in the pool), cached (owned by the radix tree) or private to one request.
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
class Holding:
    """One request's room. Of its table row, ``[0, held)`` belongs to the tree and is locked by
    the request at ``node``, ``[held, allocated)`` is private, the rest is stale."""

    request: Request
    ids: np.ndarray  # int32, the request's tokens as far as they were needed as an array
    regime: int = 0  # of its rotary embedding: keys of one regime are of no use in another
    row: int = -1  # of the slot table; -1 = holds nothing
    node: Node | None = None
    held: int = 0
    allocated: int = 0

    @property
    def namespace(self) -> bytes:
        """Which cached prefixes it may share: those of the same weights, salt and rotary regime."""
        return bytes([self.regime]) + self.request.namespace

    def tokens(self, end: int) -> np.ndarray:
        """The request's tokens ``[0, end)``, int32."""
        known = len(self.ids)
        if known < end:
            self.ids = np.concatenate([self.ids, np.array(self.request.tokens[known:], dtype=np.int32)])
        return self.ids[:end]

    def reusable(self) -> int:
        """How much cached prefix may stand in: all but the last token at most."""
        if not self.request.cacheable:
            return 0
        cap = self.request.needs.reuse_up_to
        longest = len(self.request.tokens) - 1
        return longest if cap is None else min(cap, longest)


def regime_of(length: int, boundaries: Sequence[int]) -> int:
    """The rotary regime of a sequence of ``length`` tokens: how many of the sorted ``boundaries`` it exceeds."""
    return bisect_left(boundaries, length)


class Ledger:
    """Moves slots between the pool, the radix tree and the requests."""

    def __init__(self, pool: SlotPool, table: SlotTable, radix: RadixCache | None) -> None:
        self._pool = pool
        self._table = table
        self._radix = radix

    @property
    def available(self) -> int:
        """Slots that can be allocated now, cached ones that may be evicted included."""
        return self._pool.free + (self._radix.evictable if self._radix else 0)

    @property
    def caches(self) -> bool:
        """Is there a radix tree?"""
        return self._radix is not None

    @property
    def version(self) -> int:
        """Unchanged as long as ``probe`` gives the same answers."""
        return self._radix.version if self._radix else 0

    def probe(self, holding: Holding) -> int:
        """How many tokens ``open`` would find cached. Changes nothing."""
        reusable = holding.reusable()
        if self._radix is None or reusable == 0:
            return 0
        return self._radix.probe(holding.namespace, holding.tokens(reusable))

    def open(self, holding: Holding) -> bool:
        """Give the request a table row and lock its cached prefix, which counts as computed.

        False, and nothing changes, when the table is full.
        """
        row = self._table.take()
        if row is None:
            return False
        holding.row = row
        reusable = holding.reusable()
        if self._radix is not None and reusable > 0:
            match = self._radix.match(holding.namespace, holding.tokens(reusable))
            self._radix.lock(match.node)
            self._table.slots[row, : match.length] = match.slots
            holding.node, holding.held = match.node, match.length
        holding.request.computed = holding.allocated = holding.held
        return True

    def grow(self, holdings: Sequence[Holding], ends: Sequence[int]) -> None:
        """Allocate private slots so that each holding reaches its end, evicting as needed.

        The sum must be available. A holding that reaches its end already stays as it is.
        """
        rows: list[int] = []  # single tokens, the bulk of a decode pass, are written in one go
        columns: list[int] = []
        stretches: list[tuple[int, int, int]] = []
        for holding, end in zip(holdings, ends, strict=True):
            start = holding.allocated
            if end == start + 1:
                rows.append(holding.row)
                columns.append(start)
            elif end > start:
                stretches.append((holding.row, start, end))
            holding.allocated = max(start, end)
        singles = len(rows)
        slots = self._take(singles + sum([end - start for _, start, end in stretches]))
        self._table.slots[rows, columns] = slots[:singles]
        at = singles
        for row, start, end in stretches:
            self._table.slots[row, start:end] = slots[at : at + end - start]
            at += end - start

    def store(self, holding: Holding) -> None:
        """Give the computed prefix to the tree and go on holding it there."""
        request, radix = holding.request, self._radix
        end = request.computed
        if radix is None or not request.cacheable or end <= holding.held:
            return
        tokens, slots = holding.tokens(end), self._table.slots[holding.row, :end]
        inserted = radix.insert(holding.namespace, tokens, slots)
        radix.lock(inserted.node)
        radix.unlock(holding.node)
        if inserted.existing > holding.held:  # somebody else computed the same meanwhile
            doubled = slice(holding.held, inserted.existing)
            duplicates = slots[doubled].copy()
            slots[doubled] = radix.match(holding.namespace, tokens).slots[doubled]
            self._pool.release(duplicates)
        holding.node, holding.held = inserted.node, end

    def close(self, holding: Holding) -> None:
        """Leave the computed prefix to the tree and give everything else back."""
        self.store(holding)
        self._pool.release(self._table.slots[holding.row, holding.held : holding.allocated])
        if self._radix is not None:
            self._radix.unlock(holding.node)
        self._table.give(holding.row)
        holding.row, holding.node, holding.held, holding.allocated = -1, None, 0, 0

    def reset(self) -> None:
        """Empty the tree. Nothing may be held."""
        if self._radix is not None:
            self._pool.release(self._radix.reset())

    def forget(self) -> None:
        """Empty the tree, but for what is held: that is evicted once it is let go."""
        if self._radix is not None:
            self._pool.release(self._radix.evict(self._radix.evictable))

    def _take(self, count: int) -> np.ndarray:
        if count > self._pool.free and self._radix is not None:
            self._pool.release(self._radix.evict(count - self._pool.free))
        slots = self._pool.allocate(count)
        if slots is None:
            raise AssertionError(f"{count} slots were planned, {self._pool.free} are free")
        return slots
