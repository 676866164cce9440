"""Every fault of table.py, under load: no request is lost, and the server is as before. See docs/reliability.md."""

from __future__ import annotations

import asyncio
import statistics
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from . import failed_updates, injections
from .bench import Bench, until
from .clients import Job, Load, jobs_of, seconds_to_serve
from .table import ANSWERED, FAULTS, OUTCOMES, Fault

INJECTIONS = injections.INJECTIONS | failed_updates.INJECTIONS
CLIENTS, JOBS = 8, 24

# Prompt and output with log-probabilities, and a vector.
IDS = list(range(5, 45))
SNAPSHOT: list[tuple[str, dict[str, Any], Callable[[Any], Any]]] = [
    (
        "/generate",
        {
            "input_ids": IDS,
            "sampling_params": {"max_new_tokens": 8, "temperature": 0, "ignore_eos": True},
            "return_logprob": True,
            "logprob_start_len": 0,
            "top_logprobs_num": 20,
        },
        lambda answer: [answer["meta_info"][f"{side}_top_logprobs"] for side in ("input", "output")],
    ),
    ("/encode", {"input_ids": IDS}, lambda answer: answer["embedding"]),
]


def test_each_fault_can_be_caused() -> None:
    assert INJECTIONS.keys() == {fault.name for fault in FAULTS}
    assert all(set(fault.allowed) <= OUTCOMES.keys() for fault in FAULTS)


async def snapshot(bench: Bench) -> list[Any]:
    """The numbers that an idle server with an empty cache gives; all numbers of the same weights are the same."""

    async def flushed() -> bool:
        return (await bench.call("/flush_cache")).status_code == 200

    await until(flushed)
    return [choose((await bench.call(path, body)).json()) for path, body, choose in SNAPSHOT]


async def check_well(bench: Bench, before: list[Any]) -> None:
    """All jobs are answered again, nothing is held, and the weights are the same, bit for bit."""
    clients = [bench.jobs[index::CLIENTS] for index in range(CLIENTS)]
    assert await Load(bench.server.url, clients).run() == {ANSWERED: len(bench.jobs)}
    assert await snapshot(bench) == before
    assert (await bench.call("/flush_cache")).status_code == 200

    async def all_free() -> bool:
        state = await bench.state()
        return bool(state["free_tokens"] == state["memory_usage"]["token_capacity"])

    await until(all_free)


async def repeat(bench: Bench, fault: Fault) -> tuple[Counter[str], float]:
    """Cause the fault once. The outcomes of all requests, and the seconds until one was answered again."""
    before = await snapshot(bench)
    bench.outcomes, bench.happened = Counter(), asyncio.get_running_loop().create_future()
    server = bench.server
    # When SIGTERM has drained there is no server for a client's second request.
    step = JOBS if fault.name == "SIGTERM" else CLIENTS
    load = Load(server.url, [bench.jobs[index::step] for index in range(step)])
    async with asyncio.TaskGroup() as group:
        serving = group.create_task(measure(bench))
        outcomes = await load.run(lambda: INJECTIONS[fault.name](bench))
    seconds, tries = serving.result()
    outcomes += bench.outcomes
    assert outcomes.keys() | tries.keys() <= {ANSWERED, *fault.allowed}, (outcomes, tries, tail(server))
    await check_well(bench, before)
    return outcomes, seconds


async def measure(bench: Bench) -> tuple[float, Counter[str]]:
    """From the time of the fault on, send a request until it is answered."""
    since = await bench.happened
    return await seconds_to_serve(bench.server.url, bench.jobs[1], since)


def tail(server: Any) -> str:
    """The end of the server's log, for the message of a failed assertion."""
    return str(server.log.read_text()[-3000:])


JOBS_OF_SERVERS: dict[tuple[str, ...], list[Job]] = {}


@pytest.mark.faults
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("fault", FAULTS, ids=[fault.name for fault in FAULTS])
async def test_no_request_is_lost(
    fault: Fault,
    start: Callable[[tuple[str, ...]], Any],
    checkpoints: dict[str, Path],
    repetitions: int,
    counts: dict[str, Any],
) -> None:
    server = start(fault.flags)
    if fault.flags not in JOBS_OF_SERVERS:
        JOBS_OF_SERVERS[fault.flags] = await jobs_of(server.url, JOBS)
    bench = Bench(lambda: start(fault.flags), JOBS_OF_SERVERS[fault.flags], checkpoints)
    outcomes, seconds = Counter[str](), []
    for bench.number in range(repetitions):
        found, took = await repeat(bench, fault)
        outcomes += found
        seconds.append(took)
    counts[fault.name] = {
        "repetitions": repetitions,
        "outcomes": dict(sorted(outcomes.items())),
        "lost": sum(count for outcome, count in outcomes.items() if outcome not in OUTCOMES),
        "seconds": {"median": round(statistics.median(seconds), 2), "max": round(max(seconds), 2)},
    }
    print(fault.name, counts[fault.name])
