"""Simulates routing over several replicas: how much is cached, how long requests wait, and what saturates first.

Each replica is the real scheduler with its real prefix cache; passes take the time of a model of their cost. Traffic
is generated (benchmarks/cluster/traffic.py), or recorded (benchmarks/cluster/trace.py). All times are simulated but for
those of routing, which are CPU time of this machine. benchmarks/cluster_check.py compares it with real replicas.

    python benchmarks/cluster_simulation.py [--replicas 4] [--seconds 300] [--curve 1 2 4 8 16 32 64]
    python benchmarks/cluster_simulation.py --mixes --curve --trace FILE [--trace-block 512] [--trace-speed 1]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from cluster.events import Outcome
from cluster.policies import LeastLoaded, Policy, Prefix, Random, RayPrefixAware, RoundRobin
from cluster.replica import Cost, Replica, Size
from cluster.setting import Setting, add_arguments, setting_of, trace_of
from cluster.traffic import HOT, Mix, Session, Traffic

IDEAL, LEAST, OURS = "one server, 4 × pool and speed", "least loaded", "by prefix, bounded by load"
MIXES = {"mixed": Mix(), "one hot prefix": HOT}
POLICIES: dict[str, Callable[[Sequence[Replica]], Policy]] = {
    "random": Random,
    "round robin": RoundRobin,
    LEAST: LeastLoaded,
    "Ray's prefix-aware, default": RayPrefixAware,
    "Ray's prefix-aware, threshold 10": lambda replicas: RayPrefixAware(replicas, 10),
    OURS: Prefix,
    f"{OURS}, 2 fronts": lambda replicas: Prefix(replicas, fronts=2),
}


@dataclass(frozen=True)
class Generator:
    """Generates traffic. ``rate``: sessions per second and replica."""

    rate: float
    seed: int = 1

    def sessions(self, mix: Mix, replicas: int, seconds: float) -> list[Session]:
        """Traffic for as many replicas."""
        traffic = Traffic(seed=self.seed, replicas=replicas, mix=mix)
        return list(traffic.sessions(self.rate * replicas, seconds))


@dataclass(frozen=True)
class Front:
    """Seconds of a front process per request and per output token.

    The defaults are benchmarks/results/compare-2026-11-28.md's, which contain the engine's share: upper bounds.
    """

    request: float = 564e-6
    token: float = 63e-6

    def busy(self, outcome: Outcome) -> float:
        """The share of one front process that this traffic needs."""
        return outcome.rate * (self.request + outcome.routing) + outcome.output_rate * self.token


def policies(setting: Setting, sessions: Sequence[Session], count: int) -> Iterator[str]:
    """The table of all policies."""
    yield (
        "| policy | cached | ÷ one server | wait p50 / p99 ms | p99 ÷ least loaded | first token p50 / p99 ms "
        "| replicas busy: mean / most | computed: most ÷ mean |"
    )
    yield "|---|---|---|---|---|---|---|---|"
    ideal = setting.simulate(RoundRobin, sessions, 1, scale=count)
    outcomes = {IDEAL.replace("4", str(count)): ideal}
    outcomes |= {name: setting.simulate(make, sessions, count) for name, make in POLICIES.items()}
    least = outcomes[LEAST].wait(99)
    for name, found in outcomes.items():
        yield (
            f"| {name} | {found.cached:.3f} | {found.cached / ideal.cached:.2f} "
            f"| {1e3 * found.wait(50):.0f} / {1e3 * found.wait(99):.0f} | {found.wait(99) / least:.2f} "
            f"| {1e3 * found.first(50):.0f} / {1e3 * found.first(99):.0f} "
            f"| {found.busy:.2f} / {found.busiest:.2f} | {found.imbalance:.2f} |"
        )


def curve(setting: Setting, generator: Generator, counts: Sequence[int], front: Front) -> Iterator[str]:
    """The table of numbers of replicas, at least one, on mixed traffic, and which component is nearest to its limit."""
    yield (
        "| replicas | requests/s | cached | wait p99 ms | first token p99 ms | routing µs/request | front | replicas "
        "| pool | saturates first |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for count in counts:
        found = setting.simulate(Prefix, generator.sessions(MIXES["mixed"], count, setting.seconds), count)
        shares = {"front": front.busy(found), "replicas": found.busy, "pool": found.pool}
        yield (
            f"| {count} | {found.rate:.1f} | {found.cached:.3f} | {1e3 * found.wait(99):.0f} "
            f"| {1e3 * found.first(99):.0f} | {1e6 * found.routing:.0f} "
            f"| {' | '.join(f'{share:.1%}' for share in shares.values())} | {max(shares, key=shares.__getitem__)} |"
        )
        saturated = count / shares["front"]
    yield f"\nAt the load of the last row, about {saturated:.0f} replicas saturate one front process."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    front = Front()
    add_arguments(parser, Size(), Cost(), seconds=300.0, rate=0.7)
    parser.add_argument("--mixes", nargs="*", choices=MIXES, default=list(MIXES), help="of generated traffic")
    parser.add_argument(
        "--curve", nargs="*", type=int, default=[1, 2, 4, 8, 16, 32, 64], help="replicas; with a third of the seconds"
    )
    parser.add_argument("--front-request-us", type=float, default=1e6 * front.request)
    parser.add_argument("--front-token-us", type=float, default=1e6 * front.token)
    given = parser.parse_args()
    front = Front(given.front_request_us / 1e6, given.front_token_us / 1e6)
    setting, generator = setting_of(given), Generator(given.rate, given.seed)
    loads = {name: generator.sessions(MIXES[name], given.replicas, given.seconds) for name in given.mixes}
    if given.trace:
        loads[given.trace.name] = trace_of(given)
    for name, sessions in loads.items():
        print(f"\n{given.replicas} replicas, {name}:\n")
        for line in policies(setting, sessions, given.replicas):
            print(line, flush=True)
    if given.curve:
        print("\nBy prefix, mixed:\n")
        for line in curve(replace(setting, seconds=given.seconds / 3), generator, given.curve, front):
            print(line, flush=True)


if __name__ == "__main__":
    main()
