"""Chooses the replica for each request: the one that has the longest part of its prompt cached, bounded by load.

The front estimates what a replica has cached from what it sent there; it asks no replica. docs/scaling.md has the
simulation from which the bound was chosen.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from trunkline.core.engine.messages import Load

BLOCK = 32  # tokens; prefixes are compared in these steps, and shorter ones aren't known to be cached
DECODE_WORK = 256  # work of a request whose prompt is computed: passes in which it decodes delay other requests
FACTOR = 1.25  # a replica is over the bound when its work is more than this many times the mean …
SLACK = 1536  # … and this much more
STEP = 256  # works are compared in these steps, so that fronts that know slightly different ones agree
NEWEST = 0.02  # weight of the newest request in the mean work of requests
_SEED = 17  # the same in every front
_MIX = 0x9E3779B97F4A7C15  # 2**64 / golden ratio
_MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Prompt:
    """A sequence of token ids, as its prefixes' hashes: of ``BLOCK`` tokens, 2 · ``BLOCK``, and so on.

    A hash is the sum of each token times a random number of its position, modulo 2**64. A collision costs only
    time: the replica has less cached than was expected.
    """

    ids: bytes  # int32 little-endian
    namespace: bytes
    prefixes: list[int]
    first: int  # hash of the first block, or of all tokens if there are fewer

    @classmethod
    def of(cls, ids: bytes, namespace: bytes = b"") -> Prompt:
        """``ids``: int32 little-endian. ``namespace``: weights and salt; no prefix is shared between namespaces."""
        start = _digest(namespace)
        sums = _sums(ids, 0, start)
        prefixes: list[int] = sums[BLOCK - 1 :: BLOCK].tolist()
        return cls(ids, namespace, prefixes, prefixes[0] if prefixes else int(sums[-1]) if len(sums) else start)

    def extended(self, output: bytes) -> Prompt:
        """The prompt with the tokens after it (int32 little-endian)."""
        if not self.prefixes:
            return Prompt.of(self.ids + output, self.namespace)
        ids, done = self.ids + output, BLOCK * len(self.prefixes)
        sums = _sums(ids[4 * done :], done, self.prefixes[-1])
        return Prompt(ids, self.namespace, self.prefixes + sums[BLOCK - 1 :: BLOCK].tolist(), self.first)

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return len(self.ids) // 4

    def rank(self, seed: int) -> int:
        """The order of replicas for new prompts (rendezvous hashing): the same in every front, random over prompts."""
        return (seed ^ self.first) * _MIX & _MASK


@dataclass(slots=True, eq=False)
class _Replica:
    """What the front knows about a replica.

    ``cached``: hashes of prefixes, least recently used first. A prefix is always used later than those that
    extend it, so it is evicted after them, and the cached part of a prompt is found by bisection.
    """

    name: str
    seed: int
    blocks: int
    cached: OrderedDict[int, None] = field(default_factory=OrderedDict)
    requests: int = 0  # of this front, waiting or running
    work: float = 0.0  # of these requests, in tokens
    others: int = 0  # requests of other fronts, by the last heartbeat

    def cached_tokens(self, prompt: Prompt) -> int:
        """How much of a prompt is cached, in tokens."""
        prefixes, cached = prompt.prefixes, self.cached
        if not prefixes or prefixes[0] not in cached:
            return 0
        if prefixes[-1] in cached:
            return BLOCK * len(prefixes)
        return BLOCK * bisect_left(prefixes, True, key=lambda prefix: prefix not in cached)

    def insert(self, prompt: Prompt) -> None:
        """A prompt was sent, or has been extended by its output."""
        cached = self.cached
        for prefix in reversed(prompt.prefixes):
            cached[prefix] = None
            cached.move_to_end(prefix)
        while len(cached) > self.blocks:
            cached.popitem(last=False)


@dataclass(slots=True, eq=False)
class Sent:
    """A request at a replica, from :meth:`PrefixRouting.sent` to :meth:`PrefixRouting.ended`."""

    replica: _Replica
    prompt: Prompt
    work: float  # tokens


class PrefixRouting:
    """The replicas of one model, and which one each request goes to. Not thread-safe.

    A replica's work is the tokens of prompts that it has yet to compute, without the cached ones, and ``DECODE_WORK``
    per request. The replica with the longest cached prefix is chosen, of those whose work is within the bound; of
    several, the one with the least work.
    """

    def __init__(self) -> None:
        self._replicas: dict[str, _Replica] = {}
        self._mean_work = float(DECODE_WORK)  # of a request when it is sent

    def add(self, replica: str, slots: int) -> None:
        """A replica has started, with nothing cached. ``slots``: size of its KV pool in tokens."""
        self._replicas[replica] = _Replica(replica, _digest(replica.encode()), max(1, slots // BLOCK))

    def remove(self, replica: str) -> None:
        """A replica has ended; its requests may still end later."""
        del self._replicas[replica]

    def flush(self, replica: str) -> None:
        """Its prefix cache was emptied."""
        self._replicas[replica].cached.clear()

    def observe(self, replica: str, load: Load) -> None:
        """The load in a replica's heartbeat: requests beyond those of this front are another front's."""
        state = self._replicas[replica]
        state.others = max(0, load.waiting + load.running - state.requests)

    def choose(self, prompt: Prompt) -> list[str]:
        """All replicas, best first: later ones are for when the ones before refuse the request."""
        works = [(state, state.work + state.others * self._mean_work) for state in self._replicas.values()]
        bound = FACTOR * sum([work for _, work in works]) / max(1, len(works)) + SLACK
        order = [
            (work > bound, -state.cached_tokens(prompt), work // STEP, prompt.rank(state.seed), state.name)
            for state, work in works
        ]
        return [name for *_, name in sorted(order)]

    def sent(self, replica: str, prompt: Prompt) -> Sent:
        """A replica has accepted a request. KeyError if the replica was removed."""
        state = self._replicas[replica]
        work = float(DECODE_WORK + prompt.tokens - state.cached_tokens(prompt))
        self._mean_work += NEWEST * (work - self._mean_work)
        state.insert(prompt)
        state.requests += 1
        state.work += work
        return Sent(state, prompt, work)

    def computed(self, sent: Sent) -> None:
        """A request's first result has arrived, so its prompt is computed."""
        sent.replica.work += DECODE_WORK - sent.work
        sent.work = DECODE_WORK

    def ended(self, sent: Sent, output: bytes = b"") -> None:
        """A request has ended, with these tokens after its prompt (int32 little-endian)."""
        state, prompt = sent.replica, sent.prompt
        state.requests -= 1
        state.work -= sent.work
        if output:
            state.insert(prompt.extended(output))


def _sums(ids: bytes, at: int, start: int) -> NDArray[np.uint64]:
    """``start`` plus the hashes of all prefixes of the tokens, which are at positions from ``at`` on; uint64."""
    tokens = np.frombuffer(ids, dtype="<i4").astype(np.uint64)
    tokens += np.uint64(1)  # so that a token 0 counts
    tokens *= _coefficients(max(1 << 13, 1 << (at + len(tokens)).bit_length()))[at : at + len(tokens)]
    sums: NDArray[np.uint64] = np.cumsum(tokens)
    sums += np.uint64(start)
    return sums


@lru_cache
def _coefficients(count: int) -> NDArray[np.uint64]:
    """Random odd numbers, one per position; a longer array begins with the numbers of a shorter one."""
    numbers: NDArray[np.uint64] = np.random.PCG64(_SEED).random_raw(count)
    return numbers | np.uint64(1)


def _digest(data: bytes) -> int:
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "little")
