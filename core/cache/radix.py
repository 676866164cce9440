"""The prefix cache: a radix tree over token ids whose nodes hold slots of the KV pool.

A pure data structure over int32 arrays; slots are only numbers to it. Edges can be split at any token (page
size 1). Each lock is counted on the locked node and all its ancestors. So an unlocked node has no
locked descendants, and all tokens that count as evictable can be freed.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np

_EMPTY = np.empty(0, dtype=np.int32)


class Node:
    """A node and the edge that leads to it, with its ``tokens`` and their ``slots`` (int32, equal lengths).

    The children of the root are namespaces and hold no tokens.
    """

    __slots__ = ("children", "key", "locks", "parent", "queued", "slots", "tokens", "used")

    def __init__(self, key: int | bytes, tokens: np.ndarray, slots: np.ndarray, parent: Node | None) -> None:
        self.key = key  # in the parent's ``children``: the first token, or the namespace
        self.tokens = tokens
        self.slots = slots
        self.parent = parent
        self.children: dict[int | bytes, Node] = {}
        self.locks = 0
        self.used = 0  # clock of the last match or insert on this path
        self.queued = False  # has an entry in the eviction queue


@dataclass(frozen=True, slots=True)
class Match:
    """The longest cached prefix: its length in tokens, its slots (int32 ``[length]``), the node where it ends.

    ``node`` is None when nothing matched. Callers lock it before the tree changes again.
    """

    length: int
    slots: np.ndarray
    node: Node | None


@dataclass(frozen=True, slots=True)
class Inserted:
    """The result of an insertion: ``existing`` leading tokens were in the tree; the sequence ends at ``node``."""

    existing: int
    node: Node | None


class RadixCache:
    """Token prefixes by namespace, with reference counts and least-recently-used eviction."""

    def __init__(self) -> None:
        self.evictable = 0  # tokens in unlocked nodes
        self.version = 0  # changes whenever the set of cached prefixes does
        self._clock = 0
        self._root = Node(b"", _EMPTY, _EMPTY, None)
        # Heap of (used, tie-break, leaf); entries may be outdated, see evict.
        self._queue: list[tuple[int, int, Node]] = []
        self._pushes = 0

    def match_length(self, namespace: bytes, tokens: np.ndarray) -> int:
        """Length of the longest cached prefix, in tokens. Changes nothing, not even the order of eviction."""
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
        """The longest cached prefix of ``tokens`` (int32); its nodes become the most recently used."""
        node, length = self._descend(namespace, tokens)
        if node is None or length == 0:
            return Match(0, _EMPTY, None)
        return Match(length, self._path_slots(node), node)

    def insert(self, namespace: bytes, tokens: np.ndarray, slots: np.ndarray) -> Inserted:
        """Insert a sequence (both int32, of equal lengths). The tree then owns ``slots[existing:]``.

        For the ``existing`` leading tokens, the tree keeps its own slots, which may differ from the
        caller's. Arrays are copied. AssertionError for different lengths.
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
        """Protect the prefix that ends at ``node`` from eviction. Locks are counted."""
        while node is not None:
            if node.locks == 0:
                self.evictable -= len(node.tokens)
            node.locks += 1
            node = node.parent

    def unlock(self, node: Node | None) -> None:
        """Undo one :meth:`lock`. AssertionError if there is none."""
        while node is not None:
            if node.locks == 0:
                raise AssertionError("a cached prefix was unlocked more often than locked")
            node.locks -= 1
            if node.locks == 0:
                self.evictable += len(node.tokens)
                self._enqueue(node)
            node = node.parent

    def evict(self, count: int) -> np.ndarray:
        """Remove ``count`` tokens, or all evictable ones if there are fewer; returns their slots, int32.

        The least recently used leaves are removed first, each from its end: the rest is still a prefix.
        """
        freed: list[np.ndarray] = []
        missing = count
        while missing > 0 and self._queue:
            used, _, node = heapq.heappop(self._queue)
            node.queued = False
            if node.used != used:  # used since it was queued: queue it again with its new time
                self._enqueue(node)
            elif not node.locks and not node.children:
                freed.append(self._shorten(node, missing))
                missing -= len(freed[-1])
        if not freed:
            return _EMPTY
        self.version += 1
        return np.concatenate(freed)

    def reset(self) -> np.ndarray:
        """Empty the tree and return all slots, int32. AssertionError while a prefix is locked."""
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
        """The deepest node on the path of ``tokens``, and its depth in tokens.

        If the match ends inside an edge, the edge is split there.
        """
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
        """Insert a node above ``lower`` that takes over its first ``at`` tokens; returns the new node.

        ``lower`` stays the node where the whole prefix ends, so that references to it remain valid.
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
        """Queue a node for eviction if it is an unlocked leaf with tokens and isn't queued yet."""
        if node.queued or node.locks or node.children or len(node.tokens) == 0:
            return
        node.queued = True
        self._pushes += 1
        heapq.heappush(self._queue, (node.used, self._pushes, node))

    def _shorten(self, leaf: Node, count: int) -> np.ndarray:
        """Remove up to ``count`` tokens from a leaf's end, and the leaf if it has none left; returns their slots."""
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
            del self._root.children[parent.key]  # it was the last prefix of its namespace
        else:
            self._enqueue(parent)

    def _path_slots(self, node: Node) -> np.ndarray:
        arrays = []
        at: Node | None = node
        while at is not None:
            arrays.append(at.slots)
            at = at.parent
        return np.concatenate(arrays[::-1])

    def _nodes(self) -> list[Node]:
        found: list[Node] = []
        pending = list(self._root.children.values())
        while pending:
            node = pending.pop()
            found.append(node)
            pending.extend(node.children.values())
        return found


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """Number of leading elements that are equal in two int32 arrays."""
    length = min(len(a), len(b))
    if length == 0:
        return 0
    differs = a[:length] != b[:length]
    first = int(differs.argmax())
    return first if differs[first] else length
