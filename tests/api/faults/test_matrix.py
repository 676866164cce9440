"""Every fault of one server in table.py, under load: no request is lost, and the server is as before.

See docs/reliability.md.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from . import failed_updates, injections
from .bench import Bench
from .clients import Job, jobs_of
from .runs import JOBS, Run, counts_of, repeat
from .table import FAULTS, OUTCOMES, Fault

INJECTIONS = injections.INJECTIONS | failed_updates.INJECTIONS


def test_each_fault_can_be_caused() -> None:
    assert INJECTIONS.keys() == {fault.name for fault in FAULTS}
    assert all(set(fault.allowed) <= OUTCOMES.keys() for fault in FAULTS)


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
    runs: list[Run] = []
    for bench.number in range(repetitions):
        runs.append(await repeat(bench, fault, INJECTIONS[fault.name]))
    counts[fault.name] = counts_of(fault, runs)
    print(fault.name, counts[fault.name])
