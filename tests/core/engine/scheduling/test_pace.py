"""Chunks of prompts are bounded by the time that they take beside decoding requests."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from trunkline.core.cache.pool import SlotPool, SlotTable
from trunkline.core.engine.scheduling.pace import LEAST, Pace
from trunkline.core.engine.scheduling.scheduler import Scheduler
from trunkline.core.types import Needs, Request

DECODE, TOKEN = 0.010, 0.0002  # seconds of a decode pass, and of a prompt token


def simulate(pace: Pace, chunk: int, passes: int = 50) -> list[int]:
    """The chunks of a prompt without end on a machine of fixed speed, after a warm-up."""
    for _ in range(5):
        pace.observe(4, 0, DECODE)
    chunks = []
    for _ in range(passes):
        chunks.append(pace.tokens(chunk))
        pace.observe(4, chunks[-1], DECODE + chunks[-1] * TOKEN)
    return chunks


def test_by_default_a_chunk_takes_twice_as_long_as_decoding() -> None:
    chunks = simulate(Pace(), 1024)
    assert chunks[0] == 1024, "nothing was measured yet"
    assert chunks[-1] == pytest.approx(2 * DECODE / TOKEN, rel=0.02)


@pytest.mark.parametrize(("limit", "tokens"), [(0.020, 100), (0.1, 500), (9.0, 1024), (0.000_1, LEAST)])
def test_a_limit_in_seconds(limit: float, tokens: int) -> None:
    assert simulate(Pace(limit), 1024)[-1] == pytest.approx(tokens, rel=0.02)


def test_it_follows_the_speed() -> None:
    pace = Pace(0.020)
    simulate(pace, 1024)
    for _ in range(40):
        pace.observe(4, 0, DECODE)
        pace.observe(4, 100, DECODE + 100 * 4 * TOKEN)  # longer contexts: a token takes four times as long
    assert pace.tokens(1024) == pytest.approx(25 if LEAST < 25 else LEAST)


def test_small_chunks_stay() -> None:
    assert simulate(Pace(0.000_1), 7)[-1] == 7


def test_the_first_prompt_of_a_server_is_measured_alone() -> None:
    pace = Pace()
    pace.observe(0, 1024, 1024 * TOKEN)
    assert pace.tokens(1024) == 1024
    pace.observe(1, 0, DECODE)
    assert pace.tokens(1024) == pytest.approx(2 * DECODE / TOKEN, rel=0.02)


def request(key: int, length: int, new: int = 5) -> Request:
    return Request(key, "", "", None, [7] * length, length, needs=Needs(new_tokens=new))


@pytest.fixture
def paced() -> Scheduler:
    pace = Pace()
    simulate(pace, 1024)
    return Scheduler(SlotPool(4000), SlotTable(8, 4000), None, chunk=1024, max_running=8, policy="fcfs", pace=pace)


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
    assert max(bounded) <= 2.05 * DECODE / TOKEN
    assert (0, 1024) in sizes[2:], "full chunks when nothing is decoding"
