"""The radix tree against a dictionary of all cached prefixes, eviction order included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from trunkline.core.cache.radix import Node, RadixCache

Prefix = tuple[bytes, tuple[int, ...]]

NAMESPACES = st.sampled_from([b"a", b"b"])
TOKENS = st.lists(st.integers(0, 2), max_size=10)


def tokens_in(tree: RadixCache) -> list[int]:
    """All tokens that the tree holds slots for."""
    found, pending = [], [tree._root]
    while pending:
        node = pending.pop()
        found += node.tokens.tolist()
        pending += node.children.values()
    return found


def ids(tokens: list[int] | range) -> np.ndarray:
    return np.array(tokens, dtype=np.int32)


class RadixMachine(RuleBasedStateMachine):
    """Every operation on the tree and on the naive model, which maps each prefix to a slot."""

    def __init__(self) -> None:
        super().__init__()
        self.tree = RadixCache()
        self.slots: dict[Prefix, int] = {}
        self.used: dict[Prefix, int] = {}
        self.locked: list[tuple[Prefix, Node | None]] = []
        self.clock = 0
        self.next_slot = 0

    def touch(self, namespace: bytes, tokens: list[int]) -> list[int]:
        """The model's match: slots of the longest cached prefix, each step of it marked as used."""
        self.clock += 1
        found: list[int] = []
        for end in range(1, len(tokens) + 1):
            prefix = (namespace, tuple(tokens[:end]))
            if prefix not in self.slots:
                break
            self.used[prefix] = self.clock
            found.append(self.slots[prefix])
        return found

    def is_locked(self, prefix: Prefix) -> bool:
        return any(
            held[0] == prefix[0] and held[1][: len(prefix[1])] == prefix[1] and len(held[1]) >= len(prefix[1])
            for held, _ in self.locked
        )

    @rule(namespace=NAMESPACES, tokens=TOKENS, lock=st.booleans())
    def match(self, namespace: bytes, tokens: list[int], lock: bool) -> None:
        assert self.tree.match_length(namespace, ids(tokens)) == self.tree.match(namespace, ids(tokens)).length
        found = self.tree.match(namespace, ids(tokens))
        assert found.slots.tolist() == self.touch(namespace, tokens)
        assert found.length == len(found.slots)
        if lock:
            self.tree.lock(found.node)
            self.locked.append(((namespace, tuple(tokens[: found.length])), found.node))

    @rule(namespace=NAMESPACES, tokens=TOKENS, lock=st.booleans())
    def insert(self, namespace: bytes, tokens: list[int], lock: bool) -> None:
        slots = list(range(self.next_slot, self.next_slot + len(tokens)))
        self.next_slot += len(tokens)
        inserted = self.tree.insert(namespace, ids(tokens), ids(slots))
        assert inserted.existing == len(self.touch(namespace, tokens))
        for end in range(inserted.existing + 1, len(tokens) + 1):
            prefix = (namespace, tuple(tokens[:end]))
            self.slots[prefix] = slots[end - 1]
            self.used[prefix] = self.clock
        if lock:
            self.tree.lock(inserted.node)
            self.locked.append(((namespace, tuple(tokens)), inserted.node))

    @rule(which=st.integers(0, 100))
    def unlock(self, which: int) -> None:
        if self.locked:
            _, node = self.locked.pop(which % len(self.locked))
            self.tree.unlock(node)

    @rule(count=st.integers(0, 8))
    def evict(self, count: int) -> None:
        freed = self.tree.evict(count).tolist()
        expected = []
        for _ in range(count):
            leaves = [
                prefix
                for prefix in self.slots
                if not self.is_locked(prefix)
                and not any((prefix[0], (*prefix[1], token)) in self.slots for token in range(3))
            ]
            if not leaves:
                break
            oldest = min(leaves, key=lambda prefix: self.used[prefix])
            expected.append(self.slots.pop(oldest))
            del self.used[oldest]
        assert sorted(freed) == sorted(expected)

    @rule()
    def reset(self) -> None:
        if any(prefix[1] for prefix, _ in self.locked):
            with pytest.raises(AssertionError, match="locked"):
                self.tree.reset()
        else:
            assert sorted(self.tree.reset().tolist()) == sorted(self.slots.values())
            self.slots.clear()
            self.used.clear()

    @invariant()
    def counts_agree(self) -> None:
        assert len(tokens_in(self.tree)) == len(self.slots)
        assert self.tree.evictable == sum(not self.is_locked(prefix) for prefix in self.slots)

    @invariant()
    def empty_namespaces_are_gone(self) -> None:
        assert set(self.tree._root.children) == {prefix[0] for prefix in self.slots}

    @invariant()
    def version_stands_for_the_contents(self) -> None:
        known = getattr(self, "last", None)
        if known is not None and known[0] == self.tree.version:
            assert known[1] == set(self.slots)
        self.last = (self.tree.version, set(self.slots))


TestRadix = RadixMachine.TestCase
TestRadix.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def split_shifted(self: RadixCache, lower: Node, at: int, original: Callable[..., Node]) -> Node:
    lower.slots = np.roll(lower.slots, 1)
    return original(self, lower, at)


def split_unlocked(self: RadixCache, lower: Node, at: int, original: Callable[..., Node]) -> Node:
    upper = original(self, lower, at)
    upper.locks = 0
    return upper


def split_old(self: RadixCache, lower: Node, at: int, original: Callable[..., Node]) -> Node:
    upper = original(self, lower, at)
    lower.used = self._clock
    return upper


def shorten_keeps_count(self: RadixCache, leaf: Node, count: int, original: Callable[..., Any]) -> Any:
    self.evictable += 1
    return original(self, leaf, count)


@pytest.mark.parametrize(
    ("name", "defect"),
    [
        ("_split", split_shifted),
        ("_split", split_unlocked),
        ("_split", split_old),
        ("_shorten", shorten_keeps_count),
    ],
)
def test_the_property_catches(name: str, defect: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    original = getattr(RadixCache, name)
    monkeypatch.setattr(RadixCache, name, lambda self, node, at: defect(self, node, at, original))
    quick = settings(
        max_examples=300,
        stateful_step_count=40,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    with pytest.raises(AssertionError):
        run_state_machine_as_test(RadixMachine, settings=quick)


def test_a_prefix_that_ends_inside_an_edge_is_found() -> None:
    tree = RadixCache()
    tree.insert(b"", ids([1, 2, 3, 4]), ids([10, 11, 12, 13]))
    assert tree.match(b"", ids([1, 2, 9])).slots.tolist() == [10, 11]
    inserted = tree.insert(b"", ids([1, 2, 9]), ids([20, 21, 22]))
    assert inserted.existing == 2
    assert tree.match(b"", ids([1, 2, 9])).slots.tolist() == [10, 11, 22]
    assert tree.match(b"", ids([1, 2, 3, 4])).slots.tolist() == [10, 11, 12, 13]
    assert len(tokens_in(tree)) == 5


def test_namespaces_share_nothing() -> None:
    tree = RadixCache()
    tree.insert(b"x", ids([1, 2]), ids([0, 1]))
    assert tree.match(b"y", ids([1, 2])).length == 0


def test_eviction_takes_the_end_of_the_oldest_leaf() -> None:
    tree = RadixCache()
    tree.insert(b"", ids([1, 2, 3]), ids([0, 1, 2]))
    tree.insert(b"", ids([5, 6, 7]), ids([3, 4, 5]))
    tree.match(b"", ids([1, 2, 3]))
    assert tree.evict(2).tolist() == [4, 5]
    assert tree.match(b"", ids([5, 6, 7])).length == 1
    assert tree.evict(99).size == 4
    assert tree.evictable == 0
    assert not tokens_in(tree)


def test_a_locked_prefix_stays_and_its_rest_goes() -> None:
    tree = RadixCache()
    tree.insert(b"", ids(range(8)), ids(range(8)))
    match = tree.match(b"", ids(range(3)))
    tree.lock(match.node)
    assert tree.evictable == 5
    assert sorted(tree.evict(99).tolist()) == [3, 4, 5, 6, 7]
    tree.unlock(match.node)
    with pytest.raises(AssertionError, match="unlocked"):
        tree.unlock(match.node)


def test_every_token_needs_a_slot() -> None:
    with pytest.raises(AssertionError, match="slot"):
        RadixCache().insert(b"", ids([1, 2]), ids([1]))


def test_arrays_are_copied() -> None:
    tree = RadixCache()
    tokens, slots = ids([1, 2, 3]), ids([4, 5, 6])
    tree.insert(b"", tokens, slots)
    tokens[:] = slots[:] = 0
    assert tree.match(b"", ids([1, 2, 3])).slots.tolist() == [4, 5, 6]
