"""How the faults of replicas are caused in the middle of a load. Other clients go on until all replicas are back."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.api.faults.bench import Bench, Injections, until
from tests.api.faults.clients import Job, Load, client_of, send
from tests.api.faults.failed_updates import lost_update, update
from tests.api.faults.table import ANSWERED

from .cluster import REPLICAS, Cluster, is_loaded, loads

INJECTIONS = Injections()
CLIENTS, WAITING = 2, 8  # which go on
PAUSE = 0.1  # seconds between two of their requests: replicas that start need processor time, too
STOPPED, CONTINUED, PAUSES = 0.5, 0.1, 10  # seconds, and how often a slow engine is stopped
SAMPLES = 64  # of the long request
SLOW = 0.2  # seconds of each of its passes, so that it would take longer than PATIENCE


@dataclass
class ReplicaBench(Bench):
    """``updated``: the jobs with the answers of the updated weights. ``folder``: an empty one."""

    updated: list[Job] = field(default_factory=list)
    folder: Path = Path()

    @property
    def cluster(self) -> Cluster:
        found: Cluster = self.server
        return found

    def chosen(self, processes: list[psutil.Process]) -> psutil.Process:
        """One of the processes, in each repetition another one."""
        return processes[self.number % len(processes)]

    async def has(self, replicas: int = REPLICAS) -> bool:
        """Whether as many replicas are up."""
        return is_loaded(await asyncio.to_thread(loads, self.cluster.url), replicas)

    async def under_load(self, work: Coroutine[Any, Any, None]) -> None:
        """Do something while clients send requests."""
        task = asyncio.create_task(work)

        async def client(first: int) -> None:
            async with client_of(self.cluster.url) as http:
                jobs = self.under_fault or self.jobs
                for job in itertools.cycle(jobs[first:] + jobs[:first]):
                    if task.done():
                        return
                    self.outcomes[await send(http, job)] += 1
                    await asyncio.sleep(PAUSE)

        try:
            await asyncio.gather(*(client(index) for index in range(CLIENTS)))
        finally:
            await task

    async def lost_and_back(self) -> None:
        """Until a replica is gone, and all are up again."""

        async def lost() -> bool:
            return not await self.has()

        await until(lost)
        await until(self.has)


def causes(name: str) -> Callable[[Callable[[ReplicaBench], Awaitable[None]]], None]:
    """Register the decorated function."""

    def register(function: Callable[[ReplicaBench], Awaitable[None]]) -> None:
        @INJECTIONS.causes(name)
        async def inject(bench: Bench) -> None:
            assert isinstance(bench, ReplicaBench)
            await function(bench)

    return register


@causes("replica: kill -9 of its engine")
async def kill_engine(bench: ReplicaBench) -> None:
    bench.chosen(bench.cluster.engines()).kill()
    bench.mark()
    await bench.under_load(bench.lost_and_back())


@causes("replica: kill -STOP of its engine")
async def stop_engine(bench: ReplicaBench) -> None:
    bench.chosen(bench.cluster.engines()).suspend()
    bench.mark()
    await bench.under_load(bench.lost_and_back())


@causes("replica: a slow engine")
async def slow_engine(bench: ReplicaBench) -> None:
    engine = bench.chosen(bench.cluster.engines())
    bench.mark()

    async def slow() -> None:
        for _ in range(PAUSES):
            engine.suspend()
            await asyncio.sleep(STOPPED)
            engine.resume()
            await asyncio.sleep(CONTINUED)

    await bench.under_load(slow())
    assert engine.is_running()
    assert await bench.has()


@causes("replica: kill -9 of its actor")
async def kill_actor(bench: ReplicaBench) -> None:
    engines = bench.cluster.engines()
    actor = bench.chosen(bench.cluster.actors())
    (engine,) = [one for one in engines if one.ppid() == actor.pid]
    actor.kill()
    bench.mark()
    await bench.under_load(bench.lost_and_back())
    assert not engine.is_running()


@causes("a node is lost")
async def lose_node(bench: ReplicaBench) -> None:
    async def lose() -> None:
        await asyncio.to_thread(bench.cluster.second_node, "lose")
        await until(lambda: bench.has(REPLICAS - 1))
        await asyncio.to_thread(bench.cluster.second_node, "add")
        await until(bench.has)

    bench.mark()
    await bench.under_load(lose())


@causes("scale 3, 1, 3")
async def scale(bench: ReplicaBench) -> None:
    async def deploy() -> None:
        for replicas in (1, REPLICAS):
            await asyncio.to_thread(bench.cluster.deploy, replicas)
            await until(lambda replicas=replicas: bench.has(replicas))  # type: ignore[misc]

    bench.mark()
    await bench.under_load(deploy())


@causes("update: a replica dies while it loads")
async def kill_loading(bench: ReplicaBench) -> None:
    await bench.arm("read", f"killed:{bench.folder / f'read {bench.number}'}")
    updating = asyncio.create_task(update(bench, "sound", f"killed {bench.number}"))
    bench.mark()
    await lost_update(bench, updating)
    await bench.under_load(until(bench.has))


@causes("update: a replica dies in the swap")
async def kill_swapping(bench: ReplicaBench) -> None:
    """The old weights are restored when the new ones have been seen everywhere."""
    label, file = f"new {bench.number}", bench.folder / f"swap {bench.number}"
    await bench.arm("swap", f"killed:{file}")
    bench.mark()
    try:
        answer = await update(bench, "sound", label)
        assert answer.json()["success"], answer.text
        assert file.exists(), "no engine was killed"

        async def all_have_it() -> bool:
            return [state["weight_version"] for state in await bench.states()] == [label] * REPLICAS

        await bench.under_load(until(all_have_it))
        await check_answers(bench, bench.updated)
    finally:
        answer = await update(bench, "served", "old")
    assert answer.json()["success"], answer.text
    await check_answers(bench, bench.jobs)


async def check_answers(bench: ReplicaBench, jobs: list[Job]) -> None:
    """All replicas get some of the jobs."""
    clients = [jobs[index::WAITING] for index in range(WAITING)]
    assert await Load(bench.cluster.url, clients).run() == {ANSWERED: len(jobs)}


@causes("the ingress is killed")
async def kill_ingress(bench: ReplicaBench) -> None:
    """Among its requests is one that would take long: the replicas must abort it."""
    parameters = {"n": SAMPLES, "max_new_tokens": 400, "temperature": 0, "ignore_eos": True}
    long = Job("/generate", {"input_ids": [9, 8, 7], "sampling_params": parameters}, ())

    async def has_long() -> bool:
        found = await asyncio.to_thread(loads, bench.cluster.url)
        return sum(one["num_running_reqs"] + one["num_waiting_reqs"] for one in found) >= SAMPLES

    async def is_released() -> bool:
        found = await asyncio.to_thread(loads, bench.cluster.url)
        return is_loaded(found) and not await has_long()

    await bench.call("/slow_down", {"forward_sleep_time": SLOW})
    async with client_of(bench.cluster.url) as http:
        sending = asyncio.create_task(send(http, long))
        await until(has_long)
        bench.cluster.ingress().kill()
        bench.mark()
        bench.outcomes[await sending] += 1
    await until(is_released)
    await bench.call("/slow_down", {"forward_sleep_time": None})
