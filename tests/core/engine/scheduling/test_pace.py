"""Chunks of prompts are bounded by the time that they take beside decoding requests."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from trunkline.core.cache.pool import SlotPool, SlotTable
from trunkline.core.engine.scheduling.batch import OLDEST_SHARE
from trunkline.core.engine.scheduling.pace import BURST, BURST_FROM, LEAST, OWN_STRETCH, STRETCH, Pace
from trunkline.core.engine.scheduling.scheduler import Scheduler
from trunkline.core.engine.startup import schedule
from trunkline.core.settings import ModelSettings
from trunkline.core.types import Needs, Request

# Seconds of any pass, of each decoding request, of having prompts, and of each of their tokens.
FIXED, DECODE, PROMPTS, TOKEN = (
    0.008,
    0.0005,
    0.004,
    0.0004,
)
ROWS = 4


def seconds(decodes: int, prompt_tokens: int) -> float:
    return FIXED + decodes * DECODE + (prompt_tokens > 0) * PROMPTS + prompt_tokens * TOKEN


def simulate(pace: Pace, chunk: int, passes: int = 60) -> list[int]:
    """The chunks of a prompt without end beside four requests, on a machine of fixed speed."""
    for rows in (1, 2, 3, *[ROWS] * 100):
        pace.observe(rows, 0, seconds(rows, 0))
    for size in (300, 100, 700):
        pace.observe(0, size, seconds(0, size))
    chunks = []
    for _ in range(passes):
        chunks.append(pace.tokens(chunk, ROWS, 1))
        pace.observe(ROWS, chunks[-1], seconds(ROWS, chunks[-1]))
    return chunks


def test_without_measurements_chunks_are_whole() -> None:
    assert Pace(0.001).tokens(1024, ROWS, 1) == 1024


def test_passes_that_compiled_are_forgotten() -> None:
    pace, clean = Pace(), Pace()
    for tokens in (4, 0, 0):
        pace.observe(ROWS, tokens, 20.0)
    pace.forget()
    assert simulate(pace, 8192) == simulate(clean, 8192)


def test_passes_that_are_all_alike_leave_the_numbers_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    # One client whose prompts are cached but for a token. With the real factor it takes many more passes to overflow.
    monkeypatch.setattr("trunkline.core.engine.scheduling.pace.FORGETTING", 0.9)
    pace = Pace()
    with np.errstate(all="raise", under="ignore"):
        for number in range(10_000):
            pace.observe(1, number % 20 == 0, seconds(1, number % 20 == 0))
            assert LEAST <= pace.tokens(1024, 1, 1) <= 1024


@pytest.mark.parametrize(("limit", "tokens"), [(0.024, 50), (0.104, 250), (9.0, 1024), (0.000_1, LEAST)])
def test_a_limit_in_seconds(limit: float, tokens: int) -> None:
    assert simulate(Pace(limit), 1024)[-1] == pytest.approx(tokens, rel=0.05)


def test_by_default_passes_take_longer_by_a_factor() -> None:
    """Than those without prompts usually take, or than the pass itself would take without prompts."""
    pace = Pace()
    chunk = simulate(pace, 1024)[-1]
    assert seconds(ROWS, chunk) == pytest.approx(STRETCH * seconds(ROWS, 0), rel=0.1)
    many = pace.tokens(1024, 40, 1)
    assert seconds(40, many) == pytest.approx(OWN_STRETCH * seconds(40, 0), rel=0.1)
    for _ in range(100):  # most tokens come from passes with 40 requests: few of them don't call for smaller chunks
        for rows in (40, ROWS, ROWS, ROWS):
            pace.observe(rows, 0, seconds(rows, 0))
    assert seconds(ROWS, pace.tokens(1024, ROWS, 1)) == pytest.approx(STRETCH * seconds(40, 0), rel=0.1)


def test_when_many_prompts_wait_chunks_are_larger() -> None:
    pace, limited = Pace(), Pace(0.030)
    simulate(pace, 1024)
    simulate(limited, 1024)
    chunks = [pace.tokens(1024, ROWS, waiting) for waiting in (1, BURST_FROM, BURST_FROM + 3, 100)]
    assert chunks[0] == chunks[1] < chunks[2] < chunks[3]
    assert seconds(ROWS, chunks[3]) == pytest.approx(BURST * STRETCH * seconds(ROWS, 0), rel=0.1)
    assert limited.tokens(1024, ROWS, 100) == limited.tokens(1024, ROWS, 1)  # an explicit limit holds


def test_interrupted_passes_hardly_count() -> None:
    pace, undisturbed = Pace(), Pace()
    expected = simulate(undisturbed, 1024)[-1]
    simulate(pace, 1024)
    for number in range(100):
        chunk = 0 if number % 3 else 50
        pace.observe(ROWS, chunk, seconds(ROWS, chunk) if number % 10 else 2.0)
    assert pace.tokens(1024, ROWS, 1) == pytest.approx(expected, rel=0.5)


def test_more_decoding_requests_are_not_taken_for_slower_prompts() -> None:
    """While prompts are computed, each pass has one more request that decodes."""
    pace = Pace(0.044)
    simulate(pace, 1024)
    for rows in range(4, 40):
        chunk = pace.tokens(1024, rows, 1)
        assert chunk == pytest.approx((0.044 - PROMPTS) / TOKEN, rel=0.1)
        pace.observe(rows, chunk, seconds(rows, chunk))


def test_it_follows_the_speed() -> None:
    pace = Pace(0.020)
    simulate(pace, 1024)
    for number in range(400):
        chunk = 0 if number % 3 else 50 + number % 2 * 100
        pace.observe(ROWS, chunk, 4 * seconds(ROWS, chunk))
    assert pace.tokens(1024, ROWS, 1) == LEAST


def test_noise_is_averaged() -> None:
    pace, dice = Pace(0.044), random.Random(1)
    simulate(pace, 1024)
    for _ in range(300):
        rows, chunk = dice.randint(1, 8), dice.choice([0, 0, 64, 128])
        pace.observe(rows, chunk, seconds(rows, chunk) * dice.uniform(0.8, 1.3))
    assert pace.tokens(1024, ROWS, 1) == pytest.approx((0.044 - PROMPTS) / TOKEN, rel=0.3)


def test_small_chunks_stay() -> None:
    assert simulate(Pace(0.000_1), 7)[-1] == 7


@pytest.mark.parametrize(("flag", "limit"), [(None, None), (20.0, 0.020), (0.0, 0.0)])
def test_the_setting(flag: float | None, limit: float | None) -> None:
    candidate: Any = SimpleNamespace(settings=ModelSettings(model_path="m", max_stall_ms=flag), pass_tokens=64)
    served: Any = SimpleNamespace(max_total_tokens=100, max_running_requests=4)
    pace = schedule(candidate, served, None, SlotTable(4, 100), ()).pace
    assert (pace is None) == (flag == 0)  # no limit
    assert pace is None or pace._limit == limit


def request(key: int, length: int, new: int = 5) -> Request:
    return Request(key, "", "", None, [key] * length, length, needs=Needs(new_tokens=new))


@pytest.fixture
def paced() -> Scheduler:
    return scheduler_of(0.044)


def scheduler_of(limit: float) -> Scheduler:
    """A scheduler whose passes prompts may make longer by as many seconds."""
    pace = Pace(limit)
    simulate(pace, 1024)
    return Scheduler(SlotPool(4000), SlotTable(8, 4000), None, chunk=1024, max_running=8, policy="fcfs", pace=pace)


def test_short_prompts_overtake_long_ones_beside_decoding_requests(paced: Scheduler) -> None:
    """But for a share of each pass, which is for the prompt that was admitted first."""
    paced.add(request(1, 20, new=50))
    first = paced.plan()
    assert first is not None
    paced.commit(first)
    first.rows[0].request.tokens.append(3)
    for key, length in ((2, 1500), (3, 700), (4, 60)):
        paced.add(request(key, length))
    batch = paced.plan()
    assert batch is not None
    sizes = {row.request.key: row.end - row.start for row in batch.rows}
    budget = sum(sizes.values()) - 1
    assert budget == pytest.approx(0.04 / TOKEN, rel=0.1)
    share = -(-budget // OLDEST_SHARE)
    assert sizes == {1: 1, 2: share, 4: 60, 3: budget - share - 60}


def test_urgent_prompts_come_first(paced: Scheduler) -> None:
    paced.add(request(1, 20, new=50))
    first = paced.plan()
    assert first is not None
    paced.commit(first)
    first.rows[0].request.tokens.append(3)
    urgent = request(3, 700)
    urgent.priority = 1
    for each in (request(2, 60), urgent):
        paced.add(each)
    batch = paced.plan()
    assert batch is not None
    assert [row.request.key for row in batch.rows] == [1, 3]


def test_the_scheduler_bounds_chunks_only_beside_decoding_requests(paced: Scheduler) -> None:
    paced.add(request(1, 1500))
    sizes = []
    finish: Callable[[Request], bool] = paced.finish
    for number in range(20):
        batch = paced.plan()
        if batch is None:
            break
        sizes.append((batch.decodes, batch.tokens - batch.decodes))
        paced.commit(batch)
        for row in batch.rows:
            if row.final:
                row.request.tokens.append(3)
                if row.request.output_len == 5:
                    finish(row.request)
        if number == 1:
            paced.add(request(2, 1500))
    assert sizes[:2] == [(0, 1024), (0, 476)]
    bounded = [prompt for decodes, prompt in sizes if decodes and prompt]
    assert bounded
    assert max(bounded) <= 1.1 * 0.04 / TOKEN
    assert (0, 1024) in sizes[2:], "full chunks when nothing is decoding"


@pytest.mark.parametrize("chunk", [1024, None])
def test_prompts_beside_decoding_requests_of_another_model(chunk: int | None) -> None:
    """The time that may be added is for the passes of both. Prompts that are computed whole: one at least."""
    paced, pace = scheduler_of(0.0436), Pace()
    simulate(pace, 1024)
    other = Scheduler(SlotPool(4000), SlotTable(8, 4000), None, chunk=chunk, max_running=8, policy="fcfs", pace=pace)
    paced.add(request(1, 20, new=50))
    assert paced.delay is None
    first = paced.plan(beside=[other])
    assert first is not None
    paced.commit(first)
    first.rows[0].request.tokens.append(3)
    assert paced.delay == 0.0436
    paced.add(request(6, 20, new=50))
    assert paced.delay == 0.0218  # prompts of its own delay them, too
    for key, length in ((2, 20), (3, 10), (4, 200), (5, 20)):
        other.add(request(key, length, new=0))
    sizes = []
    while (batch := other.plan(beside=[paced])) is not None:
        sizes.append([row.end - row.start for row in batch.rows])
        other.commit(batch)
        for row in batch.rows:
            if row.final:
                other.finish(row.request)
    assert pace.tokens_beside([0.0218], 1024) == pace.tokens_beside([0.0436, None], 1024) == 24
    assert sizes == ([[20], [10], [200], [20]] if chunk is None else [[20, 4], [6, 18], *[[24]] * 7, [14, 10], [10]])
