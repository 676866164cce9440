"""Every fault of replicas in tests/api/faults/table.py, under load, and the ingress without one.

No request is lost, and at most those in flight at the replica fail. See docs/reliability.md.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.api.faults.clients import clear_answer, client_of, jobs_of
from tests.api.faults.failed_updates import update
from tests.api.faults.runs import CLIENTS, JOBS, Run, counts_of, repeat
from tests.api.faults.table import ANSWERED, OUTCOMES, REPLICAS, Fault

from .cluster import Cluster
from .injections import INJECTIONS, ReplicaBench

SAMPLE = 3  # faults, if the suite's time is limited: another test of the suite takes most of it
SPARE = 8  # jobs, in case that some have no clear answer with the updated weights

pytestmark = pytest.mark.ray


def test_each_fault_can_be_caused() -> None:
    assert INJECTIONS.keys() == {fault.name for fault in REPLICAS}
    assert all(set(fault.allowed) <= OUTCOMES.keys() for fault in REPLICAS)


@pytest.fixture(scope="module")
def bench(
    cluster: Cluster,
    zoo: Callable[[str], Path],
    other: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> ReplicaBench:
    """The cluster with its jobs, and their answers with both checkpoints."""
    checkpoints = {"served": zoo("llama"), "sound": other("llama")}
    return asyncio.run(prepare(cluster, checkpoints, tmp_path_factory.mktemp("faults")))


async def prepare(cluster: Cluster, checkpoints: dict[str, Path], folder: Path) -> ReplicaBench:
    bench = ReplicaBench(lambda: cluster, [], checkpoints, folder=folder)
    jobs = await jobs_of(cluster.url, JOBS + SPARE)
    assert (await update(bench, "sound")).status_code == 200
    async with client_of(cluster.url) as http:
        answers = [await clear_answer(http, job.path, job.body) for job in jobs]
    assert (await update(bench, "served", "old")).status_code == 200
    pairs = [(job, answer) for job, answer in zip(jobs, answers, strict=True) if answer is not None][:JOBS]
    assert len(pairs) == JOBS
    bench.jobs = [job for job, _ in pairs]
    bench.updated = [replace(job, expected=answer) for job, answer in pairs]
    return bench


async def test_requests_through_rays_proxy(cluster: Cluster) -> None:
    async with client_of(cluster.url) as http:
        assert [model["id"] for model in (await http.get("/v1/models")).json()["data"]] == ["tiny"]
        assert (await http.post("/generate", json={"input_ids": "x"})).status_code == 400
        assert (await http.post("/flush_cache")).status_code == 200


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("fault", REPLICAS, ids=[fault.name for fault in REPLICAS])
async def test_other_replicas_are_unaffected(
    fault: Fault, bench: ReplicaBench, repetitions: int, counts: dict[str, Any], suite: Any
) -> None:
    if suite.seconds is not None and fault not in suite.random.sample(REPLICAS, SAMPLE):
        pytest.skip(f"{SAMPLE} of {len(REPLICAS)} faults of replicas, chosen by the seed: all take too long")
    pairs = zip(bench.jobs, bench.updated, strict=True)
    swapped = [replace(job, other=updated.expected) for job, updated in pairs]
    bench.under_fault = swapped if fault.name == "update: a replica dies in the swap" else []
    runs: list[Run] = []
    for bench.number in range(repetitions):
        run = await repeat(bench, fault, INJECTIONS[fault.name])
        if fault.name != "the ingress is killed":
            assert run.tries.keys() == {ANSWERED}, "a request that was sent after the fault failed"
            assert sum(count for outcome, count in run.outcomes.items() if outcome != ANSWERED) <= CLIENTS
        runs.append(run)
    counts[fault.name] = counts_of(fault, runs)
    print(fault.name, counts[fault.name])
