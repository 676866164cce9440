"""Who is next in line."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from trunkline.core.cache.ledger import SlotAllocation
from trunkline.core.engine.scheduling.waiting import Entry, InFlight, WaitingQueue
from trunkline.core.types import Request


def entry(order: int, priority: int = 0, cached: int = 0) -> Entry:
    request = Request(order, "", "", None, [1], 1, priority=priority)
    made = Entry(request, np.array([1], dtype=np.int32), order=order)
    made.cached = cached
    return made


def holding(tokens: list[int], *, computed: int = 0, namespace: bytes = b"", cacheable: bool = True) -> SlotAllocation:
    request = Request(0, "", "", None, tokens, len(tokens), namespace=namespace, cacheable=cacheable)
    request.computed = computed
    return SlotAllocation(request, np.array(tokens, dtype=np.int32))


def orders(queue: WaitingQueue) -> list[int]:
    ledger: Any = SimpleNamespace(version=-1)  # the entries' lengths of cached prefixes are those of this version
    return [entry.order for entry in queue.candidates(ledger)]


@pytest.mark.parametrize(("policy", "expected"), [("fcfs", [2, 0, 1, 3]), ("lpm", [2, 3, 0, 1])])
def test_order(policy: str, expected: list[int]) -> None:
    queue = WaitingQueue(policy, max_overtakes=10)
    for one in (entry(0), entry(1), entry(2, priority=1), entry(3, cached=9)):
        queue.add(one)
    assert orders(queue) == expected
    assert len(queue) == len(list(queue)) == 4


@pytest.mark.parametrize("policy", ["fcfs", "lpm"])
def test_retracted_requests_come_first_within_their_priority(policy: str) -> None:
    queue = WaitingQueue(policy, max_overtakes=10)
    for one in (entry(0, cached=9), entry(1, priority=1)):
        queue.add(one)
    queue.requeue(entry(7))
    queue.requeue(entry(5))
    assert orders(queue) == [1, 5, 7, 0]
    assert queue.retracted == 2
    queue.admit(list(queue)[1])
    queue.remove(list(queue)[-1])
    assert (orders(queue), queue.retracted) == ([1, 7], 1)
    queue.remove(list(queue)[-1])
    assert (orders(queue), queue.retracted) == ([1], 0)


def test_patience_ends() -> None:
    queue = WaitingQueue("lpm", max_overtakes=3)
    queue.add(entry(0))
    for number in range(1, 4):
        favourite = entry(number, cached=50)
        queue.add(favourite)
        assert orders(queue)[0] == number
        queue.admit(favourite)
    queue.add(entry(9, cached=50))
    assert orders(queue) == [0, 9]


def test_leaving() -> None:
    queue = WaitingQueue("lpm", max_overtakes=3)
    first, second = entry(0), entry(1)
    queue.add(first)
    queue.add(second)
    queue.remove(first)
    assert orders(queue) == [1]


TOKENS = list(range(100))


@pytest.mark.parametrize(
    ("running", "candidate", "cached", "expected"),
    [
        (holding(TOKENS), holding(TOKENS), 0, True),
        (holding(TOKENS, computed=40), holding(TOKENS), 40, True),
        (holding(TOKENS), holding([*TOKENS[:31], 5, 6]), 0, False),  # too little to share
        (holding(TOKENS), holding([*TOKENS[:32], 5, 6]), 0, True),
        (holding(TOKENS, computed=40), holding([*TOKENS[:41], 5]), 40, True),  # waiting for all that is shared
        (holding(TOKENS, computed=41), holding([*TOKENS[:41], 5]), 41, False),
        (holding(TOKENS, computed=99), holding(TOKENS), 90, False),  # it decodes
        (holding(TOKENS), holding(TOKENS, namespace=b"salt"), 0, False),
        (holding(TOKENS), holding(TOKENS, cacheable=False), 0, False),
        (holding(TOKENS, cacheable=False), holding(TOKENS), 0, False),
        (holding(TOKENS, computed=40), holding([9, *TOKENS[1:]]), 40, False),  # same stretch, other beginning
    ],
)
def test_waiting_for_a_prefix_in_flight(
    running: SlotAllocation, candidate: SlotAllocation, cached: int, expected: bool
) -> None:
    in_flight = InFlight()
    in_flight.add(running)
    assert in_flight.covers(candidate, cached) == expected
