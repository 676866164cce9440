"""The scheduler over a fake model: always alive, no slot lost or shared, same tokens as alone.

The fake model's "keys and values" of a token are a hash of everything before it, of the regime
of its sequence's length and of the model's weights, kept per slot; the next token is a function of that
hash. A slot that was overwritten, freed too early or taken from the wrong prefix, regime or weights
therefore changes what a request says, and is seen at the next read.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from trunkline.core.cache.ledger import Ledger, SlotAllocation, regime_of
from trunkline.core.cache.pool import SlotPool, SlotTable
from trunkline.core.cache.radix import RadixCache
from trunkline.core.engine.scheduling.batch import Batch, BatchDraft
from trunkline.core.engine.scheduling.pace import Pace
from trunkline.core.engine.scheduling.row import Row
from trunkline.core.engine.scheduling.scheduler import Scheduler
from trunkline.core.engine.scheduling.waiting import Entry
from trunkline.core.types import Needs, Request

PRIME = (1 << 61) - 1
END = 0  # the token that ends a sequence early
SHARED = [[random.Random(seed).randrange(1, 7) for _ in range(200)] for seed in range(3)]  # common beginnings


def after(state: int, token: int, epoch: int) -> int:
    return (state * 1_000_003 + token + 1 + 1_000 * epoch) % PRIME


def beginning(namespace: bytes, regime: int) -> int:
    return int.from_bytes(namespace, "little") + 17 + 1_000_000 * regime


def next_token(state: int) -> int:
    return (state >> 5) % 64


def alone(prompt: list[int], namespace: bytes, new: int, boundaries: tuple[int, ...] = (), epoch: int = 0) -> list[int]:
    """What a request says when it has the model for itself and no limit on slots."""
    tokens = list(prompt)
    regime, state, known = -1, 0, 0
    for _ in range(new):
        if regime != regime_of(len(tokens), boundaries):
            regime, known = regime_of(len(tokens), boundaries), 0
            state = beginning(namespace, regime)
        for token in tokens[known:]:
            state = after(state, token, epoch)
        known = len(tokens)
        tokens.append(next_token(state))
        if tokens[-1] == END:
            break
    return tokens


class AnyPace(Pace):
    """Chunks of any size beside decoding requests, also those of other models."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.dice = random.Random(seed)

    def tokens(self, chunk: int, decodes: int, waiting: int, *, models: int = 1) -> int:
        assert decodes > 0
        assert waiting >= 0
        assert models == 2
        return self.dice.randint(1, chunk)

    def tokens_beside(self, delays: Sequence[float | None], most: int) -> int:
        return self.dice.randint(1, most)


class World:
    """A scheduler, a fake model, and everything that must hold between them."""

    def __init__(
        self,
        capacity: int,
        *,
        chunk: int | None,
        max_running: int,
        policy: str,
        cache: bool,
        boundaries: tuple[int, ...] = (),
        overlap: bool = False,
        paced: bool = False,
    ) -> None:
        """``overlap``: a batch is collected after the next one was computed. ``paced``: with :class:`AnyPace`."""
        self.overlap = overlap
        self.flying: Batch | None = None
        self.used = np.empty(0, np.int32)  # slots of the last batch that was planned
        self.ending: list[Entry] = []  # have ended; a batch in flight has a row of them
        self.overlaps = self.void = self.postponed = 0
        self.dice = random.Random(capacity)
        self.resting: dict[Entry, int] = {}  # for how many passes
        self.pool = SlotPool(capacity)
        self.table = SlotTable(max_running, capacity)
        self.radix = RadixCache() if cache else None
        self.chunk, self.max_running, self.boundaries = chunk, max_running, boundaries
        self.scheduler = Scheduler(
            self.pool,
            self.table,
            self.radix,
            chunk=chunk,
            max_running=max_running,
            policy=policy,
            boundaries=boundaries,
            pace=AnyPace(capacity) if paced else None,
        )
        self.memory = np.zeros(capacity, dtype=np.int64)
        self.live: dict[int, Request] = {}
        # Per request: its regime, and the right memory of each known token.
        self.states: dict[int, tuple[int, list[int]]] = {}
        self.epoch = 0
        self.born: dict[int, int] = {}  # per request: the epoch in which all of it is computed, if no update comes
        self.crossings = self.in_place = 0
        self.passes = self.retractions = self.reused = self.added = self.pass_bound = 0

    def add(self, prompt: list[int], *, new: int, namespace: bytes = b"", **options: Any) -> None:
        reuse_up_to, lockstep = options.pop("reuse_up_to", None), options.pop("lockstep", False)
        request = Request(
            key=self.added,
            rid="",
            task="",
            params=None,
            tokens=list(prompt),
            prompt_len=len(prompt),
            needs=Needs(new_tokens=new, reuse_up_to=reuse_up_to, lockstep=lockstep),
            namespace=bytes([self.epoch % 256]) + namespace,
            **options,
        )
        self.born[request.key] = self.epoch
        self.added += 1
        self.pass_bound += (len(prompt) + new) * (1 + len(self.boundaries))
        self.live[request.key] = request
        self.states[request.key] = -1, []
        self.scheduler.add(request)

    def demand(self) -> int:
        return sum(request.prompt_len + request.needs.new_tokens for request in self.live.values())

    def expected(self, request: Request, end: int) -> list[int]:
        regime = regime_of(len(request.tokens), self.boundaries)
        before, states = self.states[request.key]
        if regime != before:
            self.crossings += before >= 0
            states = []
            self.states[request.key] = regime, states
        for token in request.tokens[len(states) : end]:
            states.append(after(states[-1] if states else beginning(request.namespace, regime), token, self.epoch))
        return states[:end]

    def step(self, fails: str = "nothing") -> bool:
        """One pass; False when there was nothing to do. ``fails``: everything, or only its last row."""
        first = self.scheduler._running[0].request if self.scheduler.running else None
        if first is not None and first.schedule.regime != regime_of(len(first.tokens), self.boundaries):
            first = None  # a request that crosses a boundary gives up its place, once per boundary
        if first is not None and first.schedule in self.resting:
            first = None
        previous, self.flying = self.flying, None
        batch = self.scheduler.plan(ahead=previous is not None, beside=[self.scheduler])
        if batch is not None:
            self.check_batch(batch)
            self.forward(batch)
            self.overlaps += previous is not None
        elif previous is None:
            assert self.scheduler.idle, "requests are here and nothing runs"
            assert not self.live
            return False
        if previous is None and first is not None:
            assert batch is not None
            assert any(row.request is first for row in batch.rows), "the first made no progress"
        if previous is not None and self.land(previous, batch, fails):
            batch = None
        self.flying = batch
        if not self.overlap:
            self.land_flying(fails)
        return True

    def land_flying(self, fails: str = "nothing") -> None:
        """Collect the batch in flight, as before a control."""
        batch, self.flying = self.flying, None
        if batch is not None:
            self.land(batch, None, fails)

    def land(self, batch: Batch, following: Batch | None, fails: str) -> bool:
        """Collect a batch. True when ``following``, the one in flight after it, was cancelled by a failure."""
        cancelled = fails != "nothing" and following is not None
        if cancelled:
            assert following is not None
            self.scheduler.cancel(following)
        if fails == "pass":
            self.scheduler.cancel(batch)
        else:
            self.passes += 1
            failed = batch.rows[-1].request if fails == "row" else None
            computed, again = batch.postpone({row.request.key for row in batch.rows if self.postpones(row, failed)})
            self.scheduler.cancel(again)
            self.scheduler.commit(computed, set() if failed is None else {failed.key})
            if failed is not None and failed.key in self.live:
                self.remove(failed)
            self.collect(computed)
            self.rest(again)
        if following is not None and not cancelled:
            assert (self.pool._state[self.used] >= 0).all(), "a batch in flight uses free slots"
        self.ending = [entry for entry in self.ending if entry.in_flight]
        return cancelled

    def postpones(self, row: Row, failed: Request | None) -> bool:
        """Whether a stage gives no result for the row now, as for a grammar whose mask is late."""
        request = row.request
        may = row.final and request.needs.lockstep and request is not failed and request.key in self.live
        return may and self.dice.random() < 0.3

    def rest(self, again: Batch) -> None:
        """Count the rests of the postponed rows by passes instead of time, so that runs can be repeated."""
        for entry, passes in tuple(self.resting.items()):
            self.resting[entry] = passes - 1
            if passes == 1:
                del self.resting[entry]
                entry.rests_until = 0.0
        for entry in again.entries:
            self.resting[entry], entry.rests_until = self.dice.randint(1, 4), np.inf
        self.postponed += len(again.rows)
        self.pass_bound += 5 * len(again.rows)

    def check_batch(self, batch: Batch) -> None:
        assert 0 < len(batch.rows) <= self.max_running
        for index, row in enumerate(batch.rows):
            request = row.request
            assert request.computed <= row.start < row.end <= len(request.tokens) + self.overlap
            assert self.overlap or request.computed == row.start
            assert row.end == request.schedule.launched
            if index < batch.decodes:
                assert request.output_len > 0 or self.overlap
                assert row.final
                assert row.end - row.start == 1
            if self.chunk is None:
                assert row.final
        if self.chunk is not None:
            assert batch.tokens - batch.decodes <= max(self.chunk - batch.decodes, self.chunk // 4, 1)
        for request in batch.started:
            cap = request.prompt_len - 1 if request.needs.reuse_up_to is None else request.needs.reuse_up_to
            assert 0 <= request.cached <= (min(cap, request.prompt_len - 1) if request.cacheable else 0)
            self.reused += request.cached
        self.retractions += len(batch.retracted)
        for request in batch.retracted:
            self.states[request.key] = self.states[request.key][0], []

    def retract(self) -> None:
        """A pause in the mode that frees all slots."""
        self.land_flying()
        for request in self.scheduler.retract(lambda request: True):
            assert request.computed == 0
            self.states[request.key] = self.states[request.key][0], []
            self.pass_bound += len(request.tokens) + request.needs.new_tokens
        assert self.scheduler.running == 0
        assert self.scheduler.flush() == (not self.live)

    def update(self) -> None:
        """Other weights, in a pause: running requests keep their keys, waiting ones have none."""
        self.land_flying()
        self.in_place += self.scheduler.running
        for request in self.live.values():
            self.expected(request, request.computed)  # of the old weights; some was taken from the cache just now
        self.epoch += 1
        requests = self.scheduler.start_epoch(self.boundaries)
        assert {request.key for request in requests} == set(self.live)
        for request in requests:
            request.namespace = bytes([self.epoch % 256]) + request.namespace[1:]
            regime, states = self.states[request.key]
            self.states[request.key] = regime, states[: request.computed]  # what a failed pass left isn't kept
            mixed = request.output_len or request.schedule.running
            self.born[request.key] = -1 if mixed else self.epoch

    def forward(self, batch: Batch) -> None:
        written: set[int] = set()
        read: set[int] = set()
        self.used = np.concatenate([self.table.slots[row.table_row, : row.end] for row in batch.rows])
        for row in batch.rows:
            slots = self.table.slots[row.table_row, : row.end]
            known = self.expected_of(row)
            assert self.memory[slots[: row.start]].tolist() == known[: row.start], "keys and values were lost"
            new = slots[row.start :].tolist()
            assert written.isdisjoint(new), "two rows write to one slot"
            assert len(set(new)) == len(new)
            written.update(new)
            read.update(slots[: row.start].tolist())
        assert written.isdisjoint(read), "a row writes over what another reads"
        for row in batch.rows:
            self.memory[self.table.slots[row.table_row, row.start : row.end]] = self.expected_of(row)[row.start :]

    def expected_of(self, row: Row) -> list[int]:
        """The right memory of a row's tokens; one of them may be known to the model only."""
        request = row.request
        states = self.expected(request, row.end)
        if row.end > len(request.tokens):
            token = next_token(int(self.memory[self.table.slots[row.table_row, row.end - 2]]))
            states = [*states, after(states[-1], token, self.epoch)]
        return states

    def collect(self, batch: Batch) -> None:
        for row in batch.rows:
            request = row.request
            if request.key not in self.live:
                self.void += 1
                continue
            assert request.computed == row.end
            if not row.final:
                continue
            if request.needs.new_tokens:
                last = self.table.slots[row.table_row, row.end - 1]
                request.tokens.append(next_token(int(self.memory[last])))
            if request.output_len == request.needs.new_tokens or (request.output_len and request.tokens[-1] == END):
                prompt, new = request.tokens[: request.prompt_len], request.needs.new_tokens
                if self.born[request.key] == self.epoch:
                    assert request.tokens == alone(prompt, request.namespace, new, self.boundaries, self.epoch)
                self.remove(request)

    def remove(self, request: Request) -> None:
        entry = request.schedule
        if not self.scheduler.finish(request):
            self.ending.append(entry)
        del self.live[request.key], self.states[request.key], self.born[request.key]

    def check_slots(self) -> None:
        """Every slot is free, cached, or private to one request; every lock has its holder."""
        holdings = [*(request.schedule for request in self.live.values()), *self.ending]
        owners = [self.pool._stack[: self.pool.free]]
        owners += self.scheduler._ledger._released
        owners += [self.table.slots[held.row, held.held : held.allocated] for held in holdings if held.row >= 0]
        if self.radix is not None:
            nodes = self.radix._nodes()
            owners += [node.slots for node in nodes]
            assert self.radix._root.locks == sum(held.node is not None for held in holdings)
        assert sorted(np.concatenate(owners).tolist()) == list(range(self.pool.capacity)), "a slot leaked or is shared"
        assert len({held.row for held in holdings if held.row >= 0}) == self.scheduler.running + len(self.ending)

    def drain(self) -> None:
        """Everything ends within as many passes as there were tokens, and nothing is left behind."""
        while self.step():
            assert self.passes <= self.pass_bound
        self.check_slots()
        assert self.scheduler.free_slots() == self.pool.capacity
        assert self.scheduler.flush()
        assert self.pool.free == self.pool.capacity


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        capacity=st.integers(4, 90),
        chunk=st.sampled_from([None, 1, 2, 7, 16, 64]),
        max_running=st.integers(1, 8),
        policy=st.sampled_from(["lpm", "fcfs"]),
        cache=st.booleans(),
        boundaries=st.sampled_from([(), (), (12,), (8, 30)]),
        overlap=st.booleans(),
        paced=st.booleans(),
    )
    def start(self, capacity: int, **options: Any) -> None:
        self.world = World(capacity, **options)

    @rule(
        length=st.integers(1, 89),
        new=st.integers(0, 40),
        shared=st.tuples(st.integers(0, 2), st.integers(0, 89)),
        priority=st.sampled_from([0, 0, 0, 1, -1]),
        salt=st.sampled_from([b"", b"", b"s"]),
        cacheable=st.sampled_from([True, True, True, False]),
        reuse_up_to=st.sampled_from([None, None, 0, 3]),
        lockstep=st.booleans(),
        copies=st.integers(1, 4),
        seed=st.integers(0, 3),
    )
    def add(
        self, length: int, new: int, shared: tuple[int, int], salt: bytes, copies: int, seed: int, **options: Any
    ) -> None:
        capacity = self.world.pool.capacity
        length = min(length, capacity)
        own = random.Random(seed)
        prompt = SHARED[shared[0]][: min(shared[1], length)]
        prompt = prompt + [own.randrange(1, 7) for _ in range(length - len(prompt))]
        for _ in range(copies):
            self.world.add(prompt, new=min(new, capacity - length), namespace=salt, **options)

    @rule(passes=st.integers(1, 12))
    def run(self, passes: int) -> None:
        for _ in range(passes):
            self.world.step()
            self.world.check_slots()

    @rule(what=st.sampled_from(["pass", "row"]))
    def fail(self, what: str) -> None:
        self.world.step(what)
        self.world.check_slots()

    @precondition(lambda self: self.world.live)
    @rule(which=st.integers(0, 1000))
    def abort(self, which: int) -> None:
        requests = list(self.world.live.values())
        self.world.remove(requests[which % len(requests)])
        self.world.check_slots()

    @rule()
    def flush(self) -> None:
        self.world.land_flying()
        assert self.world.scheduler.flush() == (not self.world.live)

    @rule(retracts=st.booleans(), updates=st.integers(0, 2), flushes=st.booleans())
    def pause(self, retracts: bool, updates: int, flushes: bool) -> None:
        if retracts:
            self.world.retract()
        for _ in range(updates):
            self.world.update()
            self.world.check_slots()
        self.world.land_flying()
        if flushes:
            assert self.world.scheduler.flush(paused=True) == (not self.world.scheduler.running)
        self.world.check_slots()

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.drain()


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def soak(seed: int, passes: int, *, check_every: int = 1) -> World:
    """Random traffic that always wants ten times the pool, with aborts and failed passes."""
    dice = random.Random(seed)
    capacity = dice.randint(24, 120)
    world = World(
        capacity,
        chunk=dice.choice([None, 1, 5, 16, 64, 256]),
        max_running=dice.randint(2, 12),
        policy=dice.choice(["lpm", "fcfs"]),
        cache=dice.random() < 0.8,
        boundaries=dice.choice([(), (), (16,), (10, 40)]),
        overlap=dice.random() < 0.5,
        paced=seed % 2 == 1,
    )
    while world.passes < passes:
        while world.demand() < 10 * capacity:
            length = dice.randint(1, dice.choice([capacity - 1, capacity // 4]))
            prompt = SHARED[dice.randrange(3)][: dice.randint(0, length)]
            prompt = prompt + [dice.randrange(1, 7) for _ in range(length - len(prompt))]
            world.add(
                prompt,
                new=dice.randint(0, capacity - length),
                namespace=dice.choice([b"", b"", b"salt"]),
                priority=dice.choice([0, 0, 1]),
                cacheable=dice.random() < 0.9,
                reuse_up_to=dice.choice([None, None, None, 0, 9]),
                lockstep=dice.random() < 0.3,
            )
        world.step(dice.choices(["nothing", "pass", "row"], [95, 2, 3])[0])
        if dice.random() < 0.03:
            world.retract()
        if dice.random() < 0.02:
            world.update()
        if dice.random() < 0.02:
            world.remove(dice.choice(list(world.live.values())))
        if world.passes % check_every == 0:
            world.check_slots()
    world.drain()
    return world


def soak_all(seeds: int, passes: int) -> list[World]:
    return [soak(seed, passes) for seed in range(seeds)]


def test_a_pool_of_a_tenth_of_demand_is_enough() -> None:
    worlds = soak_all(10, 300)
    assert sum(world.retractions for world in worlds) > 30
    assert sum(world.reused for world in worlds) > 200
    assert sum(world.crossings for world in worlds) > 30
    assert sum(world.overlaps for world in worlds) > 300
    assert sum(world.void for world in worlds) > 30
    assert sum(world.in_place for world in worlds) > 30
    assert sum(world.postponed for world in worlds) > 100


@pytest.mark.properties
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(1000, 1020))
def test_a_million_passes(seed: int) -> None:
    soak(seed, 50_000, check_every=20)


def close_leaking(self: Ledger, holding: SlotAllocation, original: Callable[..., Any]) -> None:
    holding.allocated = max(holding.held, holding.request.computed)  # forgets the slots of a failed pass
    original(self, holding)


def never_retract(self: Scheduler, draft: Any, original: Callable[..., Any]) -> bool:
    return False


def retract_the_first(self: Scheduler, draft: Any, original: Callable[..., Any]) -> Any:
    self._running.reverse()
    return original(self, draft)


def reuse_everything(self: SlotAllocation, original: Callable[..., Any]) -> int:
    return len(self.request.tokens) if self.request.cacheable else 0


def evict_ignoring_locks(self: RadixCache, node: Any, original: Callable[..., Any]) -> None:
    if node is not None and len(node.tokens) > 3:
        original(self, node)


def match_without_namespace(self: RadixCache, namespace: bytes, *arrays: Any, original: Callable[..., Any]) -> Any:
    return original(self, b"", *arrays)


def commit_too_much(self: Scheduler, batch: Batch, failed: set[int], original: Callable[..., Any]) -> None:
    original(self, batch, failed)
    for row in batch.rows:
        row.request.computed = len(row.request.tokens)


def free_slots_in_flight(self: Scheduler, request: Request, original: Callable[..., Any]) -> bool:
    entry = request.schedule
    done: bool = original(self, request)
    if not done:
        self._ledger.close(entry)
    return True


def store_and_free(self: Ledger, allocation: Any, original: Callable[..., Any], **_: Any) -> None:
    original(self, allocation)  # though a batch in flight uses the slots


def cancel_and_keep_the_place(self: Scheduler, batch: Batch, original: Callable[..., Any]) -> None:
    launched = [entry.launched for entry in batch.entries]
    original(self, batch)
    for entry, place in zip(batch.entries, launched, strict=True):
        entry.launched = place


def forget_the_oldest(self: BatchDraft, prefilling: Any, original: Callable[..., Any]) -> None:
    original(self, prefilling[1:])


def never_restart(self: Scheduler, draft: Any, original: Callable[..., Any]) -> None:
    pass


def start_epoch_and_keep_sharing(self: Scheduler, boundaries: Any, original: Callable[..., Any]) -> Any:
    cacheable = [entry.request for entry in self._running if entry.request.cacheable]
    requests = original(self, boundaries)
    for request in cacheable:
        request.cacheable = True
    return requests


def forget_what_is_held(self: Ledger, original: Callable[..., Any]) -> None:
    original(self)
    if self._radix is not None and self._radix._root.locks:
        for node in self._radix._nodes():
            node.locks = 0
            self._radix._enqueue(node)
        self._pool.release(self._radix.evict(self._pool.capacity))


def retract_and_keep_slots(self: Scheduler, chosen: Any, original: Callable[..., Any]) -> Any:
    kept = [(entry, entry.request.computed) for entry in self._running if entry.request.computed]
    requests = original(self, chosen)
    for entry, computed in kept:
        entry.request.computed = computed
    return requests


def retract_in_the_former_regime(self: Scheduler, chosen: Any, original: Callable[..., Any]) -> Any:
    former = [(entry, entry.regime) for entry in self._running]
    requests = original(self, chosen)
    for entry, regime in former:
        entry.regime = regime
    return requests


def share_between_regimes(self: SlotAllocation, original: Any) -> bytes:
    return self.request.namespace


DEFECTS: list[tuple[type, str, Callable[..., Any]]] = [
    (Ledger, "close", close_leaking),
    (Scheduler, "_retract", never_retract),
    (Scheduler, "_retract", retract_the_first),
    (Scheduler, "commit", commit_too_much),
    (Scheduler, "finish", free_slots_in_flight),
    (Ledger, "store", store_and_free),
    (Scheduler, "cancel", cancel_and_keep_the_place),
    (SlotAllocation, "reusable", reuse_everything),
    (RadixCache, "lock", evict_ignoring_locks),
    (RadixCache, "insert", match_without_namespace),
    (BatchDraft, "add_shares", forget_the_oldest),
    (Scheduler, "_requeue_past_boundary", never_restart),
    (SlotAllocation, "namespace", share_between_regimes),
    (Scheduler, "start_epoch", start_epoch_and_keep_sharing),
    (Ledger, "forget", forget_what_is_held),
    (Scheduler, "retract", retract_and_keep_slots),
    (Scheduler, "retract", retract_in_the_former_regime),
]


@pytest.mark.parametrize(("owner", "name", "defect"), DEFECTS, ids=lambda value: getattr(value, "__name__", value))
def test_the_soak_catches(owner: type, name: str, defect: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    original = getattr(owner, name)
    broken: Any = lambda self, *args, **named: defect(self, *args, original=original, **named)  # noqa: E731
    monkeypatch.setattr(owner, name, property(broken) if isinstance(original, property) else broken)
    if name == "insert":
        match = RadixCache.match
        monkeypatch.setattr(RadixCache, "match", lambda self, namespace, tokens: match(self, b"", tokens))
        monkeypatch.setattr(RadixCache, "match_length", lambda self, namespace, tokens: match(self, b"", tokens).length)
    with pytest.raises((AssertionError, IndexError)):
        soak_all(24, 250)


def test_the_machine_catches_a_first_request_that_is_retracted(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Scheduler._retract
    monkeypatch.setattr(Scheduler, "_retract", lambda self, draft: retract_the_first(self, draft, original))
    quick = settings(
        max_examples=300,
        stateful_step_count=30,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    with pytest.raises(AssertionError):
        run_state_machine_as_test(SchedulerMachine, settings=quick)
