"""One repetition of a fault: the fault under load, and whether the server is as before; the counts of all of them."""

from __future__ import annotations

import asyncio
import datetime
import json
import os
import platform
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .bench import Bench, Injection, until
from .clients import Load, seconds_to_serve
from .table import ANSWERED, Fault

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


REPETITIONS, VARIABLE = 20, "TRUNKLINE_FAULT_REPETITIONS"


@dataclass(frozen=True)
class Run:
    """``outcomes``: of all requests. ``tries``: of those that were sent from the fault on, one after another, until one
    was answered, after ``seconds``."""

    outcomes: Counter[str]
    tries: Counter[str]
    seconds: float


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
        states = await bench.states()
        return all(state["free_tokens"] == state["memory_usage"]["token_capacity"] for state in states)

    await until(all_free)


async def repeat(bench: Bench, fault: Fault, inject: Injection) -> Run:
    """Cause the fault once. AssertionError if a request is lost, or the server isn't as before."""
    before = await snapshot(bench)
    bench.outcomes, bench.happened = Counter(), asyncio.get_running_loop().create_future()
    server = bench.server
    # When SIGTERM has drained there is no server for a client's second request.
    step = JOBS if fault.name == "SIGTERM" else CLIENTS
    jobs = bench.under_fault or bench.jobs
    load = Load(server.url, [jobs[index::step] for index in range(step)])
    async with asyncio.TaskGroup() as group:
        serving = group.create_task(measure(bench))
        outcomes = await load.run(lambda: inject(bench))
    seconds, tries = serving.result()
    outcomes += bench.outcomes
    assert outcomes.keys() | tries.keys() <= {ANSWERED, *fault.allowed}, (outcomes, tries, tail(server))
    await check_well(bench, before)
    return Run(outcomes, tries, seconds)


async def measure(bench: Bench) -> tuple[float, Counter[str]]:
    """From the time of the fault on, send a request until it is answered."""
    since = await bench.happened
    return await seconds_to_serve(bench.server.url, (bench.under_fault or bench.jobs)[1], since)


def tail(server: Any) -> str:
    """The end of the server's log, for the message of a failed assertion."""
    return str(server.log.read_text()[-3000:])


def repetitions(suite: Any) -> int:
    """How often each fault is caused: as the variable says, else 20 times, or once if the suite's time is limited."""
    return int(os.environ.get(VARIABLE, 1 if suite.seconds is not None else REPETITIONS))


def counts_of(fault: Fault, runs: Sequence[Run]) -> dict[str, Any]:
    """The counts of all repetitions of a fault."""
    outcomes = sum((run.outcomes for run in runs), Counter[str]())
    seconds = [run.seconds for run in runs]
    return {
        "repetitions": len(runs),
        "outcomes": dict(sorted(outcomes.items())),
        "lost": sum(count for outcome, count in outcomes.items() if outcome not in (ANSWERED, *fault.allowed)),
        "seconds": {"median": round(statistics.median(seconds), 2), "max": round(max(seconds), 2)},
    }


@contextmanager
def recorded(results: Path, name: str, faults: Sequence[Fault]) -> Iterator[dict[str, Any]]:
    """Counts by fault. If every fault was caused several times, they are written to ``NAME-DATE.json``."""
    counts: dict[str, Any] = {}
    yield counts
    if all(counts.get(fault.name, {}).get("repetitions", 0) > 1 for fault in faults):
        today = datetime.date.today()
        head = {"date": str(today), "processor": platform.processor() or platform.machine(), "faults": counts}
        (results / f"{name}-{today}.json").write_text(json.dumps(head, indent=1) + "\n")
