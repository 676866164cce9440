"""Compiled grammars and refusals that are kept for later requests."""

from __future__ import annotations

import operator
import threading
from collections import OrderedDict
from collections.abc import Set
from dataclasses import dataclass, field

import numpy as np

from trunkline.core.errors import RequestError
from trunkline.plugins.generation.hooks import CompiledGrammar
from trunkline.plugins.generation.schemas import Grammar

MAX_ENTRIES = 64
MAX_BYTES = 256 << 20
MAX_GRAMMAR_BYTES = 32 << 20  # of one compiled grammar; ordinary ones take less than 1 MiB


@dataclass(slots=True, eq=False, weakref_slot=True)
class KeptGrammar:
    """A compiled grammar, and what its sequences share.

    ``first``: the mask of their first token, int32 ``[words]``, read-only. ``busy``: how many of them are in the hands
    of the mask threads. Their matchers may have a lock in common, for which the engine's thread mustn't wait.
    ``nbytes``: its memory, read once; a plugin's object may raise anything there.
    """

    compiled: CompiledGrammar
    first: np.ndarray
    busy: int = 0
    nbytes: int = field(init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.nbytes = operator.index(self.compiled.nbytes) + self.first.nbytes

    def enter(self) -> None:
        with self._lock:
            self.busy += 1

    def leave(self) -> None:
        with self._lock:
            self.busy -= 1


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a grammar can't be compiled, for the client."""

    reason: str

    def error(self, grammar: Grammar) -> RequestError:
        return RequestError(f"Failed to compile {grammar.kind} grammar: {self.reason}", param=grammar.kind)


class GrammarCache:
    """The most recently used compiled grammars and refusals, bounded in number and bytes."""

    def __init__(self, max_entries: int = MAX_ENTRIES, max_bytes: int = MAX_BYTES) -> None:
        self._max_entries, self._max_bytes = max_entries, max_bytes
        self._entries: OrderedDict[Grammar, KeptGrammar | Refusal] = OrderedDict()
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, grammar: Grammar) -> KeptGrammar | Refusal | None:
        entry = self._entries.get(grammar)
        if entry is not None:
            self._entries.move_to_end(grammar)
        return entry

    def drop(self, grammar: Grammar, entry: KeptGrammar) -> None:
        """Forget an entry, unless another one has taken its place."""
        if self._entries.get(grammar) is entry:
            del self._entries[grammar]
            self.nbytes -= _size(grammar, entry)

    def put(self, grammar: Grammar, entry: KeptGrammar | Refusal) -> None:
        if grammar not in self._entries:
            self._entries[grammar] = entry
            self.nbytes += _size(grammar, entry)
        while len(self._entries) > self._max_entries or (self.nbytes > self._max_bytes and len(self._entries) > 1):
            self.nbytes -= _size(*self._entries.popitem(last=False))

    def limit_unused(self, used: Set[KeptGrammar], max_bytes: int) -> None:
        """Forget grammars that aren't ``used``, the oldest first, until the others of these take ``max_bytes``."""
        entries = list(self._entries.items())
        unused = [(key, entry) for key, entry in entries if isinstance(entry, KeptGrammar) and entry not in used]
        excess = sum(entry.nbytes for _, entry in unused) - max_bytes
        for grammar, entry in unused:
            if excess <= 0:
                break
            self.drop(grammar, entry)
            excess -= entry.nbytes


def _size(grammar: Grammar, entry: KeptGrammar | Refusal) -> int:
    return 4 * len(grammar.text) + (len(entry.reason) if isinstance(entry, Refusal) else entry.nbytes)
