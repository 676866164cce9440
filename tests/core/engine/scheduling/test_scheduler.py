"""What a pass consists of: order, budget, sharing, admission, retraction."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from trunkline.core.cache.pool import SlotPool, SlotTable
from trunkline.core.cache.radix import RadixCache
from trunkline.core.engine.scheduling.batch import Batch
from trunkline.core.engine.scheduling.scheduler import Scheduler
from trunkline.core.types import Needs, Request

Make = Callable[..., Request]


def scheduler(
    slots: int = 1000, *, cache: bool = True, chunk: int | None = 64, max_running: int = 16, policy: str = "lpm"
) -> Scheduler:
    radix = RadixCache() if cache else None
    return Scheduler(
        SlotPool(slots), SlotTable(max_running, slots), radix, chunk=chunk, max_running=max_running, policy=policy
    )


@pytest.fixture
def make() -> Make:
    made: list[Request] = []

    def make(prompt: list[int] | range, new: int = 0, reuse_up_to: int | None = None, **options: Any) -> Request:
        tokens = list(prompt)
        needs = Needs(new_tokens=new, reuse_up_to=reuse_up_to)
        request = Request(len(made), "", "", None, tokens, len(tokens), needs=needs, **options)
        made.append(request)
        return request

    return make


def run(engine: Scheduler, passes: int = 1) -> Batch:
    """Run passes; every request that is up to date says one more token or ends."""
    batch = None
    for _ in range(passes):
        batch = engine.plan()
        assert batch is not None
        engine.commit(batch)
        for row in batch.rows:
            request = row.request
            if row.final:
                if request.output_len < request.needs.new_tokens:
                    request.tokens.append(1)
                if request.output_len == request.needs.new_tokens:
                    engine.finish(request)
    assert batch is not None
    return batch


def shape(batch: Batch) -> list[tuple[int, int, int]]:
    return [(row.request.key, row.start, row.end) for row in batch.rows]


def test_nothing_to_do() -> None:
    engine = scheduler()
    assert engine.plan() is None
    assert engine.idle


def test_a_long_prompt_is_computed_in_chunks(make: Make) -> None:
    engine = scheduler(chunk=64)
    engine.add(make(range(150), new=2))
    assert [shape(run(engine)) for _ in range(4)] == [[(0, 0, 64)], [(0, 64, 128)], [(0, 128, 150)], [(0, 150, 151)]]
    assert engine.idle


def test_without_chunks_a_prompt_is_computed_whole(make: Make) -> None:
    engine = scheduler(100, chunk=None, cache=False)
    for length in (60, 30, 50):
        engine.add(make(range(length)))
    assert shape(run(engine)) == [(0, 0, 60), (1, 0, 30)]
    assert shape(run(engine)) == [(2, 0, 50)]


def test_decoding_comes_first_and_shares_the_pass_with_prompts(make: Make) -> None:
    engine = scheduler(chunk=8)
    engine.add(make([1, 2, 3], new=9))
    run(engine)
    engine.add(make(range(10, 40), new=1))
    batch = run(engine)
    assert batch.decodes == 1
    assert shape(batch) == [(0, 3, 4), (1, 0, 7)]


def test_prompts_keep_a_quarter_of_the_chunk(make: Make) -> None:
    engine = scheduler(chunk=8)
    for number in range(10):
        engine.add(make([number], new=50))
    run(engine, passes=6)
    engine.add(make(range(100, 130)))
    batch = run(engine)
    assert batch.decodes == 10
    assert shape(batch)[-1] == (10, 0, 2)


def test_a_repeated_prompt_comes_from_the_cache(make: Make) -> None:
    engine = scheduler()
    for _ in range(2):
        engine.add(make(range(50), new=1))
        batch = run(engine)
    assert shape(batch) == [(1, 49, 50)]
    assert batch.rows[0].request.cached == 49


def test_output_can_be_reused_but_its_last_token_was_never_computed(make: Make) -> None:
    engine = scheduler()
    first = make(range(10), new=5)
    engine.add(first)
    run(engine, passes=5)
    second = make([*first.tokens, 7, 8])
    engine.add(second)
    run(engine)
    assert second.cached == 14


@pytest.mark.parametrize(
    ("options", "cached"),
    [
        ({}, 49),
        ({"reuse_up_to": 0}, 0),
        ({"reuse_up_to": 7}, 7),
        ({"cacheable": False}, 0),
        ({"namespace": b"salt"}, 0),
    ],
)
def test_what_may_be_reused(make: Make, options: dict[str, Any], cached: int) -> None:
    engine = scheduler()
    engine.add(make(range(50)))
    run(engine)
    request = make(range(50), **options)
    engine.add(request)
    run(engine)
    assert request.cached == cached


def test_an_uncacheable_request_leaves_nothing(make: Make) -> None:
    engine = scheduler()
    engine.add(make(range(50), cacheable=False))
    run(engine)
    request = make(range(50))
    engine.add(request)
    run(engine)
    assert request.cached == 0


def test_requests_that_share_a_long_prefix_wait_for_the_first(make: Make) -> None:
    engine = scheduler(chunk=256)
    for number in range(4):
        engine.add(make([*range(100), 500 + number]))
    engine.add(make([900, 901]))
    assert shape(run(engine)) == [(0, 0, 101), (4, 0, 2)]
    assert shape(run(engine)) == [(1, 100, 101), (2, 100, 101), (3, 100, 101)]


def test_a_short_common_prefix_is_not_waited_for(make: Make) -> None:
    engine = scheduler(chunk=256)
    for number in range(3):
        engine.add(make([*range(20), *range(500 + 50 * number, 550 + 50 * number)]))
    assert len(run(engine).rows) == 3


@pytest.mark.parametrize(("policy", "order"), [("lpm", [2, 1, 0]), ("fcfs", [0, 1, 2])])
def test_order_of_waiting_requests(make: Make, policy: str, order: list[int]) -> None:
    engine = scheduler(policy=policy, max_running=1)
    engine.add(warm := make(range(40)))
    run(engine)
    assert warm.computed == 40
    requests = [make(range(100, 110)), make([*range(20), 7]), make([*range(40), 7])]
    for request in requests:
        engine.add(request)
    assert [requests.index(run(engine).rows[0].request) for _ in range(3)] == order


def test_priority_comes_before_the_policy(make: Make) -> None:
    engine = scheduler(max_running=1)
    requests = [make([number], priority=priority) for number, priority in enumerate([0, 5, -1, 5])]
    for request in requests:
        engine.add(request)
    assert [run(engine).rows[0].request.key for _ in range(4)] == [1, 3, 0, 2]


def test_nothing_starves_behind_better_cached_requests(make: Make) -> None:
    engine = scheduler(max_running=2)
    engine.add(make(range(40)))
    run(engine)
    unlucky = make([999])
    engine.add(unlucky)
    for passes in range(20):
        for number in range(3):
            engine.add(make([*range(39), 100 + 10 * passes + number]))
        run(engine)
        if unlucky.started:
            break
    assert 0 < passes < 6


def test_admission_sets_room_aside_for_new_tokens(make: Make) -> None:
    engine = scheduler(100, cache=False)
    engine.add(make(range(40), new=60))
    engine.add(make(range(40, 80), new=60))
    assert len(run(engine).rows) == 1
    assert (engine.running, engine.waiting) == (1, 1)


def test_a_small_request_does_not_pass_a_large_one_that_waits_for_room(make: Make) -> None:
    engine = scheduler(100, policy="fcfs")
    for length in (60, 90, 2):
        engine.add(make(range(length * 1000, length * 1001), new=5))
    assert len(run(engine).rows) == 1


def test_retraction_keeps_the_first_and_takes_the_cheapest(make: Make) -> None:
    engine = scheduler(64, cache=False, max_running=3)
    requests = [make(range(50 * number, 50 * number + length), new=30) for number, length in enumerate([4, 8, 6])]
    for request in requests:
        engine.add(request)
    retracted: list[Request] = []
    while not retracted:
        retracted = run(engine).retracted
    victim = retracted[0]
    assert victim is requests[2]
    assert victim.computed == 0
    assert victim.output_len > 0
    assert victim.schedule is not None


def test_retraction_spares_high_priority(make: Make) -> None:
    engine = scheduler(56, cache=False, max_running=3)
    for number, priority in enumerate([0, 3, 1]):
        engine.add(make(range(number * 50, number * 50 + 4), new=28, priority=priority))
    retracted: list[Request] = []
    while not retracted:
        retracted = run(engine).retracted
    assert [request.priority for request in retracted] == [0]


def test_a_retracted_request_goes_on_where_it_was(make: Make) -> None:
    engine = scheduler(48, max_running=3)
    requests = [make(range(number * 50, number * 50 + 4), new=28) for number in range(3)]
    for request in requests:
        engine.add(request)
    started: list[Request] = []
    retracted: list[Request] = []
    while not engine.idle:
        batch = run(engine)
        started += batch.started
        retracted += batch.retracted
    assert retracted
    assert [request.output_len for request in requests] == [28] * 3
    assert len(started) == 3
    assert [request.cached for request in requests] == [0, 0, 0]
    assert engine.free_slots() == 48


def test_a_pass_that_failed_is_planned_again(make: Make) -> None:
    engine = scheduler(chunk=8)
    engine.add(make(range(20), new=1))
    first = engine.plan()
    free = engine.free_slots()
    assert first is not None
    engine.cancel(first)
    second = engine.plan()
    assert first is not None
    assert second is not None
    assert shape(first) == shape(second) == [(0, 0, 8)]
    assert engine.free_slots() == free


def test_finishing_is_possible_at_any_moment(make: Make) -> None:
    engine = scheduler()
    waiting, planned, running = make([1]), make(range(30), new=5), make(range(50, 90), new=5)
    engine.add(running)
    run(engine)
    engine.add(planned)
    batch = engine.plan()
    assert batch is not None
    engine.add(waiting)
    done = [engine.finish(request) for request in (waiting, planned, running, running)]
    assert done == [True, False, False, True]
    assert engine.idle
    assert engine.free_slots() < 1000, "the batch in flight has these slots"
    engine.commit(batch)
    assert engine.free_slots() == 1000


def test_flush_needs_an_idle_scheduler(make: Make) -> None:
    engine = scheduler()
    request = make(range(50), new=5)
    engine.add(request)
    assert not engine.flush()
    run(engine)
    assert not engine.flush()
    engine.finish(request)
    assert engine.flush()
    engine.add(again := make(range(50)))
    run(engine)
    assert again.cached == 0


@pytest.mark.parametrize("length", [0, 101])
def test_a_request_that_can_never_run_is_refused(make: Make, length: int) -> None:
    engine = scheduler(100)
    assert engine.max_request_tokens == 100
    with pytest.raises(ValueError, match="1 to 100 tokens"):
        engine.add(make(range(length)))


def test_a_full_table_only_delays(make: Make) -> None:
    pool, table = SlotPool(100), SlotTable(1, 100)
    engine = Scheduler(pool, table, RadixCache(), chunk=64, max_running=4, policy="fcfs")
    for number in range(3):
        engine.add(make([number], new=2))
    while not engine.idle:
        run(engine)
    assert engine.free_slots() == 100


def test_a_request_that_rests_is_computed_when_the_other_had_to_be_retracted(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trunkline.core.engine.scheduling.waiting.REST_SECONDS", 100.0)
    engine = scheduler(64, chunk=2)
    resting, long = make(range(10), new=50), make(range(100, 145), new=1)
    for _ in range(200):
        engine.plan()  # fewer slots are reserved for tokens to come
    engine.add(resting)
    engine.add(long)
    while engine.free_slots() > 8:
        run(engine)
    planned = []
    for _ in range(6):
        batch = engine.plan()
        assert batch is not None
        computed, again = batch.postpone({resting.key})
        engine.cancel(again)
        engine.commit(computed)
        planned.append((shape(batch), batch.retracted))
    assert [rows for rows, _ in planned[:-1]]
    assert planned[-1][1] == [long]
    assert [key for key, _, _ in planned[-1][0]] == [resting.key]
