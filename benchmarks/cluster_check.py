"""Compares the simulation of replicas with real replicas of a fake model, on the same traffic.

The front, its routing, the relays and the engine processes with their schedulers and caches are the real ones. Only a
pass takes the time that the simulation's formula gives, in place of a model's, and Ray is left out. Traffic is replayed
in real time, so this takes ``--seconds`` for each point.

    python benchmarks/cluster_check.py [--replicas 4] [--seconds 180] [--points one least prefix]
    python benchmarks/cluster_check.py --trace FILE [--trace-block 512] [--trace-speed 1]
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from cluster.events import Served
from cluster.policies import LeastLoaded, Policy, Prefix, RoundRobin
from cluster.real import LeastLoadedRouting, running
from cluster.replica import Cost, Replica, Size
from cluster.setting import Setting, add_arguments, setting_of, trace_of
from cluster.traffic import Mix, Session, Traffic

from trunkline.core.cluster.routing import PrefixRouting


@dataclass(frozen=True)
class Point:
    """One server of the replicas' size and speed together (``whole``), or replicas with a policy."""

    name: str
    policy: Callable[[Sequence[Replica]], Policy]
    routing: type[PrefixRouting] = PrefixRouting
    whole: bool = False


ONE, LEAST, PREFIX = "one", "least", "prefix"
POINTS = {
    ONE: Point("one server, {} × pool and speed", RoundRobin, whole=True),
    LEAST: Point("{} replicas, least loaded", LeastLoaded, LeastLoadedRouting),
    PREFIX: Point("{} replicas, by prefix, bounded by load", Prefix),
}


@dataclass(frozen=True)
class Pair:
    """The same traffic served by real replicas and in the simulation. ``overhead``: see :meth:`Replicas.overhead`."""

    measured: Served
    simulated: Served
    overhead: float


async def compare(setting: Setting, point: Point, sessions: Sequence[Session], replicas: int) -> Pair:
    """Measure and simulate a point."""
    count, scale = (1, replicas) if point.whole else (replicas, 1)
    async with running(setting, count, scale=scale, routing=point.routing) as started:
        overhead = await started.overhead()
        measured = await started.replay(sessions)
    return Pair(measured, setting.simulate(point.policy, sessions, count, scale=scale), overhead)


def row(name: str, pair: Pair) -> str:
    """A row of the table: measured, simulated."""
    columns: list[Callable[[Served], str]] = [
        lambda served: f"{served.cached:.3f}",
        lambda served: " / ".join(f"{1e3 * served.wait(percent):.0f}" for percent in (50, 95, 99)),
        lambda served: " / ".join(f"{1e3 * served.first(percent):.0f}" for percent in (50, 95, 99)),
        lambda served: f"{served.rate:.2f}",
        lambda served: f"{served.output_rate:.1f}",
    ]
    cells = [text(served) for text in columns for served in (pair.measured, pair.simulated)]
    return f"| {name} | {' | '.join(cells)} | {1e3 * pair.overhead:.1f} |"


COLUMNS = ("cached", "wait p50 / p95 / p99 ms", "first token p50 / p95 / p99 ms", "requests/s", "tokens/s")
HEAD = (
    f"| | {' | '.join(f'{column}: measured | simulated' for column in COLUMNS)} | overhead ms |\n"
    f"|{'---|' * (2 * len(COLUMNS) + 2)}"
)


def bars(pairs: Mapping[str, Pair]) -> Iterator[str]:
    """How the points compare with each other."""
    if not {ONE, LEAST, PREFIX} <= pairs.keys():
        return
    yield ""
    for kind in ("measured", "simulated"):
        one, least, prefix = (getattr(pairs[name], kind) for name in (ONE, LEAST, PREFIX))
        yield (
            f"{kind}: cached ÷ one server {prefix.cached / one.cached:.2f} by prefix, {least.cached / one.cached:.2f} "
            f"least loaded; p99 wait ÷ least loaded {prefix.wait(99) / least.wait(99):.2f}"
        )


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, Size(slots=16_384), Cost(0.08, 0.0006, 0.0002), seconds=180.0, rate=0.5)
    parser.add_argument("--points", nargs="+", choices=POINTS, default=list(POINTS))
    given = parser.parse_args()
    setting = setting_of(given)
    if given.trace:
        sessions = trace_of(given)
    else:
        traffic = Traffic(seed=given.seed, replicas=given.replicas, mix=Mix())
        sessions = list(traffic.sessions(given.rate * given.replicas, given.seconds))
    pairs = {}
    print(HEAD)
    for name in given.points:
        point = POINTS[name]
        pairs[name] = await compare(setting, point, sessions, given.replicas)
        print(row(point.name.format(given.replicas), pairs[name]), flush=True)
    for line in bars(pairs):
        print(line)


if __name__ == "__main__":
    asyncio.run(main())
