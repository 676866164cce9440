"""Slots change owners between pool, tree and requests without getting lost."""

from __future__ import annotations

import numpy as np
import pytest

from trunkline.core.cache.ledger import Ledger, SlotAllocation
from trunkline.core.cache.pool import SlotPool, SlotTable
from trunkline.core.cache.radix import RadixCache
from trunkline.core.types import Needs, Request


class Bench:
    def __init__(self, slots: int, *, cache: bool = True) -> None:
        self.pool, self.table = SlotPool(slots), SlotTable(3, slots)
        self.ledger = Ledger(self.pool, self.table, RadixCache() if cache else None)

    def open(self, tokens: range, **needs: int) -> SlotAllocation:
        request = Request(0, "", "", None, list(tokens), len(tokens), needs=Needs(**needs))
        holding = SlotAllocation(request, np.array(request.tokens, dtype=np.int32))
        assert self.ledger.open(holding)
        return holding

    def compute(self, holding: SlotAllocation, end: int) -> list[int]:
        """Grow and store; returns the slots."""
        self.ledger.grow([holding], [end])
        holding.request.computed = end
        self.ledger.store(holding)
        return self.slots(holding)

    def slots(self, holding: SlotAllocation) -> list[int]:
        return self.table.slots[holding.row, : holding.allocated].tolist()


def test_a_second_request_uses_the_slots_of_the_first() -> None:
    bench = Bench(40)
    first = bench.open(range(10))
    slots = bench.compute(first, 10)
    second = bench.open(range(20))
    assert second.request.computed == second.held == 10
    assert bench.slots(second) == slots
    assert bench.pool.free == 30


def test_what_two_requests_computed_at_once_is_kept_once() -> None:
    bench = Bench(40)
    first, second = bench.open(range(10)), bench.open(range(10))
    bench.ledger.grow([first, second], [10, 10])
    first.request.computed = second.request.computed = 10
    bench.ledger.store(first)
    assert bench.slots(first) != bench.slots(second)
    bench.ledger.store(second)
    assert bench.slots(first) == bench.slots(second)
    assert bench.pool.free == 30


@pytest.mark.parametrize("cache", [True, False])
def test_closing_gives_everything_back(cache: bool) -> None:
    bench = Bench(40, cache=cache)
    holding = bench.open(range(12))
    bench.compute(holding, 6)
    bench.ledger.grow([holding], [12])  # planned, never computed
    bench.ledger.close(holding)
    assert bench.ledger.available == 40
    assert bench.pool.free == (34 if cache else 40)
    assert bench.ledger.cached_length(holding) == (6 if cache else 0)
    bench.ledger.reset()
    assert bench.pool.free == 40


def test_growing_evicts_what_nobody_holds() -> None:
    bench = Bench(20)
    old, held = bench.open(range(8)), bench.open(range(50, 58))
    bench.compute(old, 8)
    kept = bench.compute(held, 8)
    bench.ledger.close(old)
    third = bench.open(range(100, 110))
    assert bench.ledger.available == 12
    fresh = bench.compute(third, 10)
    assert not set(fresh) & set(kept)
    assert bench.ledger.cached_length(old) == 2


def test_growing_beyond_what_is_available_is_a_bug() -> None:
    bench = Bench(10)
    first = bench.open(range(8))
    bench.compute(first, 8)
    second = bench.open(range(20, 25))
    with pytest.raises(AssertionError, match="planned"):
        bench.ledger.grow([second], [5])


def test_growing_is_idempotent() -> None:
    bench = Bench(20)
    holdings = [bench.open(range(8)), bench.open(range(30, 35))]
    for _ in range(2):
        bench.ledger.grow(holdings, [8, 1])
    assert bench.pool.free == 11


def test_tokens_follow_the_request() -> None:
    bench = Bench(20)
    holding = bench.open(range(3))
    holding.request.tokens += [7, 8]
    assert holding.tokens(4).tolist() == [0, 1, 2, 7]
    assert holding.tokens(5).dtype == np.int32
    assert holding.tokens(2).tolist() == [0, 1]


def test_a_full_table_refuses() -> None:
    bench = Bench(20)
    for start in (0, 10, 20):
        bench.open(range(start, start + 3))
    request = Request(0, "", "", None, [1], 1)
    assert not bench.ledger.open(SlotAllocation(request, np.array([1], dtype=np.int32)))
