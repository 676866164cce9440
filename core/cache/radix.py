"""The prefix cache: a radix tree over token ids whose nodes hold slots of the KV pool.

A pure data structure over int32 arrays; it knows slots by number only. Token granular: an edge
may be split anywhere. Locks are counted on every node from the locked one up to the root, so
an unlocked node has no locked descendant and everything that counts as evictable can be freed.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np

_EMPTY = np.empty(0, dtype=np.int32)


class Node:
    """An edge of the tree and what hangs below it. ``tokens`` and ``slots`` have equal lengths.

    The nodes right below the root stand for namespaces and hold no tokens.
    """

    __slots__ = ("children", "key", "locks", "parent", "queued", "slots", "tokens", "used")

    def __init__(self, key: int | bytes, tokens: np.ndarray, slots: np.ndarray, parent: Node | None) -> None:
        self.key = key  # among the parent's children: the first token, or the namespace
        self.tokens = tokens
        self.slots = slots
        self.parent = parent
        self.children: dict[int | bytes, Node] = {}
        self.locks = 0
        self.used = 0  # clock of the last match or insert that came by
        self.queued = False  # has an entry in the eviction queue


@dataclass(frozen=True, slots=True)
class Match:
    """The longest cached prefix: its length, its slots (int32 ``[length]``), where it ends.

    ``node`` is None when nothing matched. Lock it before the tree changes again.
    """

    length: int
    slots: np.ndarray
    node: Node | None


@dataclass(frozen=True, slots=True)
class Inserted:
    """``existing`` leading tokens were in the tree already; ``node`` is where the sequence ends."""

    existing: int
    node: Node | None


class RadixCache:
    """Token prefixes by namespace, with reference counts and least-recently-used eviction."""

    def __init__(self) -> None:
        self.evictable = 0  # of them in unlocked nodes
        self.version = 0  # changes whenever the set of cached prefixes does
        self._clock = 0
        self._root = Node(b"", _EMPTY, _EMPTY, None)
        self._queue: list[tuple[int, int, Node]] = []  # heap of (used, tie-break, leaf), lazily corrected
        self._pushes = 0

    def probe(self, namespace: bytes, tokens: np.ndarray) -> int:
        """Length of the longest cached prefix. Changes nothing, recency included."""
        node = self._root.children.get(namespace)
        at = 0
        while node is not None and at < len(tokens):
            node = node.children.get(int(tokens[at]))
            if node is not None:
                common = common_prefix(node.tokens, tokens[at:])
                at += common
                if common < len(node.tokens):
                    break
        return at

    def match(self, namespace: bytes, tokens: np.ndarray) -> Match:
        """The longest cached prefix of ``tokens`` (int32), marked as just used."""
        node, length = self._descend(namespace, tokens)
        if node is None or length == 0:
            return Match(0, _EMPTY, None)
        return Match(length, self._path_slots(node), node)

    def insert(self, namespace: bytes, tokens: np.ndarray, slots: np.ndarray) -> Inserted:
        """Add a sequence (both int32, equally long); the tree then owns ``slots[existing:]``.

        The leading ``existing`` tokens keep the slots that the tree had, which may differ from
        the caller's. Arrays are copied.
        """
        if len(tokens) != len(slots):
            raise AssertionError("every inserted token needs its slot")
        if len(tokens) == 0:
            return Inserted(0, None)
        node, existing = self._descend(namespace, tokens)
        if node is None:
            node = self._root.children[namespace] = Node(namespace, _EMPTY, _EMPTY, self._root)
        if existing < len(tokens):
            node = self._add_leaf(node, tokens[existing:].copy(), slots[existing:].copy())
        return Inserted(existing, node)

    def lock(self, node: Node | None) -> None:
        """Keep the prefix that ends at ``node``. Locks add up."""
        while node is not None:
            if node.locks == 0:
                self.evictable -= len(node.tokens)
            node.locks += 1
            node = node.parent

    def unlock(self, node: Node | None) -> None:
        """Undo one ``lock``. AssertionError when there was none."""
        while node is not None:
            if node.locks == 0:
                raise AssertionError("a cached prefix was unlocked more often than locked")
            node.locks -= 1
            if node.locks == 0:
                self.evictable += len(node.tokens)
                self._enqueue(node)
            node = node.parent

    def evict(self, count: int) -> np.ndarray:
        """Drop ``count`` tokens (fewer when fewer are evictable) and return their slots, int32.

        Least recently used leaves go first, from their ends: a shortened prefix is still a prefix.
        """
        freed: list[np.ndarray] = []
        missing = count
        while missing > 0 and self._queue:
            used, _, node = heapq.heappop(self._queue)
            node.queued = False
            if node.used != used:  # used since it was queued: back to its place
                self._enqueue(node)
            elif not node.locks and not node.children:
                freed.append(self._shorten(node, missing))
                missing -= len(freed[-1])
        if not freed:
            return _EMPTY
        self.version += 1
        return np.concatenate(freed)

    def reset(self) -> np.ndarray:
        """Forget everything and return all slots, int32. AssertionError while anything is locked."""
        if self._root.locks:
            raise AssertionError("the cache can't be reset while prefixes are locked")
        slots = [node.slots for node in self._nodes()]
        self._root.children.clear()
        self._queue.clear()
        self.evictable = 0
        self.version += 1
        return np.concatenate([_EMPTY, *slots])

    # -- inside --------------------------------------------------------------------------------

    def _descend(self, namespace: bytes, tokens: np.ndarray) -> tuple[Node | None, int]:
        """Deepest node on the path of ``tokens`` and its depth; splits the edge where they part."""
        self._clock += 1
        node = self._root.children.get(namespace)
        if node is None:
            return None, 0
        at = 0
        while at < len(tokens):
            child = node.children.get(int(tokens[at]))
            if child is None:
                break
            common = common_prefix(child.tokens, tokens[at:])
            if common < len(child.tokens):
                child = self._split(child, common)
            child.used = self._clock
            at += common
            node = child
        return node, at

    def _split(self, lower: Node, at: int) -> Node:
        """Put a new node above ``lower`` that takes its first ``at`` tokens; returns the new one.

        The lower end keeps its identity: whoever holds ``lower`` holds the same prefix as before.
        """
        parent = lower.parent
        assert parent is not None
        upper = Node(lower.key, lower.tokens[:at].copy(), lower.slots[:at].copy(), parent)
        upper.locks, upper.used = lower.locks, lower.used
        lower.tokens, lower.slots = lower.tokens[at:].copy(), lower.slots[at:].copy()
        lower.key, lower.parent = int(lower.tokens[0]), upper
        upper.children[lower.key] = lower
        parent.children[upper.key] = upper
        return upper

    def _add_leaf(self, parent: Node, tokens: np.ndarray, slots: np.ndarray) -> Node:
        leaf = Node(int(tokens[0]), tokens, slots, parent)
        leaf.used = self._clock
        parent.children[leaf.key] = leaf
        self.evictable += len(tokens)
        self.version += 1
        self._enqueue(leaf)
        return leaf

    def _enqueue(self, node: Node) -> None:
        """Queue a node for eviction if it is an unlocked leaf with tokens; once at most."""
        if node.queued or node.locks or node.children or len(node.tokens) == 0:
            return
        node.queued = True
        self._pushes += 1
        heapq.heappush(self._queue, (node.used, self._pushes, node))

    def _shorten(self, leaf: Node, count: int) -> np.ndarray:
        """Cut up to ``count`` tokens off a leaf's end, the leaf itself when none is left."""
        keep = max(0, len(leaf.tokens) - count)
        freed = leaf.slots[keep:]
        self.evictable -= len(freed)
        if keep:
            leaf.tokens, leaf.slots = leaf.tokens[:keep].copy(), leaf.slots[:keep].copy()
            self._enqueue(leaf)
        else:
            self._remove(leaf)
        return freed

    def _remove(self, leaf: Node) -> None:
        parent = leaf.parent
        assert parent is not None
        del parent.children[leaf.key]
        if isinstance(parent.key, bytes) and parent is not self._root and not parent.children:
            del self._root.children[parent.key]  # the last prefix of a namespace
        else:
            self._enqueue(parent)

    def _path_slots(self, node: Node) -> np.ndarray:
        parts = []
        at: Node | None = node
        while at is not None:
            parts.append(at.slots)
            at = at.parent
        return np.concatenate(parts[::-1])

    def _nodes(self) -> list[Node]:
        found: list[Node] = []
        pending = list(self._root.children.values())
        while pending:
            node = pending.pop()
            found.append(node)
            pending.extend(node.children.values())
        return found


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """Number of leading elements that two int32 arrays share."""
    length = min(len(a), len(b))
    if length == 0:
        return 0
    differs = a[:length] != b[:length]
    first = int(differs.argmax())
    return first if differs[first] else length
