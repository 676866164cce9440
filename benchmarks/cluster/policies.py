"""How requests are divided among replicas: the router under test, and what it is compared with."""

from __future__ import annotations

import random
from collections.abc import Sequence
from time import thread_time
from typing import Protocol

from cluster.replica import Call, Replica, ids_of
from cluster.traffic import Job
from trunkline.core.cluster.routing import BLOCK, PrefixRouting, Prompt, Sent


class Policy(Protocol):
    """Chooses a replica by index, and is told what happens to requests, and once a second of heartbeats.

    ``seconds``: its own CPU time, measured; 0 where it isn't.
    """

    seconds: float

    def choose(self, job: Job) -> int: ...
    def sent(self, index: int, call: Call) -> None: ...
    def computed(self, index: int, call: Call) -> None: ...
    def ended(self, index: int, call: Call) -> None: ...
    def heartbeat(self) -> None: ...


class Blind:
    """The base of policies that know only how many tokens and requests are at each replica."""

    def __init__(self, replicas: Sequence[Replica]) -> None:
        self.seconds = 0.0
        self.tokens = [0] * len(replicas)
        self.requests = [0] * len(replicas)
        self.random = random.Random(1)

    def sent(self, index: int, call: Call) -> None:
        self.tokens[index] += len(call.job.prompt)
        self.requests[index] += 1

    def computed(self, index: int, call: Call) -> None:
        pass

    def ended(self, index: int, call: Call) -> None:
        self.tokens[index] -= len(call.job.prompt)
        self.requests[index] -= 1

    def heartbeat(self) -> None:
        pass


class Random(Blind):
    """Any replica."""

    def choose(self, job: Job) -> int:
        return self.random.randrange(len(self.tokens))


class RoundRobin(Blind):
    """One after another."""

    last = -1

    def choose(self, job: Job) -> int:
        self.last = (self.last + 1) % len(self.tokens)
        return self.last


class LeastLoaded(Blind):
    """The replica with the fewest prompt tokens of requests that wait or run."""

    def choose(self, job: Job) -> int:
        return min(range(len(self.tokens)), key=self.tokens.__getitem__)


class RayPrefixAware(Blind):
    """The policy of Ray's ``PrefixCacheAffinityRouter`` (2.60), on tokens instead of characters.

    While the numbers of requests differ by at most ``imbalance``: the replicas that had the longest prefix, if that
    is at least a tenth of the prompt, else those with the fewest distinct tokens so far; of these, the one with
    fewer requests out of two at random. Otherwise the same out of all. Prompts are remembered without outputs, and
    never forgotten.
    """

    def __init__(self, replicas: Sequence[Replica], imbalance: float = float("inf")) -> None:
        super().__init__(replicas)
        self._imbalance = imbalance
        self._owners: dict[int, set[int]] = {}
        self._distinct = [0] * len(replicas)

    def choose(self, job: Job) -> int:
        everyone = range(len(self.tokens))
        if max(self.requests) - min(self.requests) > self._imbalance:
            return self._lesser(everyone)
        prefixes = Prompt.of(ids_of(job.prompt)).prefixes
        matched = next((at for at in range(len(prefixes), 0, -1) if prefixes[at - 1] in self._owners), 0)
        if matched * BLOCK < 0.1 * len(job.prompt):
            return self._lesser([index for index in everyone if self._distinct[index] == min(self._distinct)])
        return self._lesser(sorted(self._owners[prefixes[matched - 1]]))

    def sent(self, index: int, call: Call) -> None:
        super().sent(index, call)
        for prefix in Prompt.of(ids_of(call.job.prompt)).prefixes:
            owners = self._owners.setdefault(prefix, set())
            self._distinct[index] += BLOCK * (index not in owners)
            owners.add(index)

    def _lesser(self, indices: Sequence[int]) -> int:
        return min(self.random.sample(indices, min(2, len(indices))), key=self.requests.__getitem__)


class Prefix:
    """Our own, :class:`.PrefixRouting`, timed. Several ``fronts`` get requests at random; each knows of the others'
    requests only what heartbeats say."""

    def __init__(self, replicas: Sequence[Replica], fronts: int = 1) -> None:
        self.seconds = 0.0
        self._replicas = replicas
        self._fronts = [PrefixRouting() for _ in range(fronts)]
        self._indices = {replica.name: index for index, replica in enumerate(replicas)}
        self._random = random.Random(2)
        self._sent: dict[Call, tuple[PrefixRouting, Sent]] = {}
        for front in self._fronts:
            for replica in replicas:
                front.add(replica.name, replica.slots)

    def choose(self, job: Job) -> int:
        ids, self._front = ids_of(job.prompt), self._random.choice(self._fronts)
        began = thread_time()
        self._prompt = Prompt.of(ids)
        name = self._front.choose(self._prompt)[0]
        self.seconds += thread_time() - began
        return self._indices[name]

    def sent(self, index: int, call: Call) -> None:
        began = thread_time()
        sent = self._front.sent(self._replicas[index].name, self._prompt)
        self.seconds += thread_time() - began
        self._sent[call] = self._front, sent

    def computed(self, index: int, call: Call) -> None:
        front, sent = self._sent[call]
        front.computed(sent)

    def ended(self, index: int, call: Call) -> None:
        front, sent = self._sent.pop(call)
        ids = ids_of(call.job.output)
        began = thread_time()
        front.ended(sent, ids)
        self.seconds += thread_time() - began

    def heartbeat(self) -> None:
        for replica in self._replicas:
            load = replica.load()
            for front in self._fronts:
                front.observe(replica.name, load)
