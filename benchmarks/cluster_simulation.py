"""Simulates routing over several replicas: how much is cached, how long requests wait, and what saturates first.

Each replica is the real scheduler with its real prefix cache; passes take the time of a model of their cost, and
traffic is generated (benchmarks/cluster/traffic.py). All times are simulated but for those of routing, which are CPU
time of this machine.

    python benchmarks/cluster_simulation.py [--replicas 4] [--seconds 300] [--curve 1 2 4 8 16 32 64]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from cluster.events import Outcome, Simulation
from cluster.policies import LeastLoaded, Policy, Prefix, Random, RayPrefixAware, RoundRobin
from cluster.replica import Cost, Replica, Size
from cluster.traffic import HOT, Mix, Traffic

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
class Setting:
    """What is simulated. ``rate``: sessions per second and replica; the first quarter of ``seconds`` isn't counted."""

    size: Size
    cost: Cost
    rate: float
    seconds: float
    seed: int = 1

    def run(self, make: Callable[[Sequence[Replica]], Policy], mix: Mix, count: int, *, scale: int = 1) -> Outcome:
        """Simulate ``count`` replicas, each ``scale`` times as large and fast, with as much more traffic."""
        replicas = [Replica(f"replica-{index}", self.size, self.cost, scale=scale) for index in range(count)]
        traffic = Traffic(seed=self.seed, replicas=count * scale, mix=mix)
        sessions = traffic.sessions(self.rate * count * scale, self.seconds)
        return Simulation(replicas, make(replicas)).run(sessions, start=self.seconds / 4, end=self.seconds)


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


def policies(setting: Setting, mix: Mix, count: int) -> Iterator[str]:
    """The table of all policies."""
    yield (
        "| policy | cached | ÷ one server | wait p50 / p99 ms | p99 ÷ least loaded | first token p50 / p99 ms "
        "| replicas busy: mean / most | computed: most ÷ mean |"
    )
    yield "|---|---|---|---|---|---|---|---|"
    ideal = setting.run(RoundRobin, mix, 1, scale=count)
    outcomes = {IDEAL.replace("4", str(count)): ideal}
    outcomes |= {name: setting.run(make, mix, count) for name, make in POLICIES.items()}
    least = outcomes[LEAST].wait(99)
    for name, found in outcomes.items():
        yield (
            f"| {name} | {found.cached:.3f} | {found.cached / ideal.cached:.2f} "
            f"| {1e3 * found.wait(50):.0f} / {1e3 * found.wait(99):.0f} | {found.wait(99) / least:.2f} "
            f"| {1e3 * found.first(50):.0f} / {1e3 * found.first(99):.0f} "
            f"| {found.busy:.2f} / {found.busiest:.2f} | {found.imbalance:.2f} |"
        )


def curve(setting: Setting, mix: Mix, counts: Sequence[int], front: Front) -> Iterator[str]:
    """The table of numbers of replicas, at least one, and which component is nearest to its limit."""
    yield (
        "| replicas | requests/s | cached | wait p99 ms | first token p99 ms | routing µs/request | front | replicas "
        "| pool | saturates first |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for count in counts:
        found = setting.run(Prefix, mix, count)
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
    size, cost, front = Size(), Cost(), Front()
    parser.add_argument("--replicas", type=int, default=4)
    parser.add_argument("--mixes", nargs="*", choices=MIXES, default=list(MIXES))
    parser.add_argument("--curve", nargs="*", type=int, default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--seconds", type=float, default=300.0, help="simulated; the curve has a third of them")
    parser.add_argument("--rate", type=float, default=0.7, help="sessions per second and replica")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--slots", type=int, default=size.slots, help="tokens of a replica's KV pool")
    parser.add_argument("--chunk", type=int, default=size.chunk, help="tokens of a pass")
    parser.add_argument("--running", type=int, default=size.running, help="requests that a replica runs")
    parser.add_argument("--fixed-ms", type=float, default=1e3 * cost.fixed, help="of a pass")
    parser.add_argument("--token-ms", type=float, default=1e3 * cost.per_token, help="per token of a pass")
    parser.add_argument("--decode-ms", type=float, default=1e3 * cost.per_decode, help="per decoding row of a pass")
    parser.add_argument("--front-request-us", type=float, default=1e6 * front.request)
    parser.add_argument("--front-token-us", type=float, default=1e6 * front.token)
    given = parser.parse_args()
    cost = Cost(given.fixed_ms / 1e3, given.token_ms / 1e3, given.decode_ms / 1e3)
    size = Size(given.slots, given.chunk, given.running)
    front = Front(given.front_request_us / 1e6, given.front_token_us / 1e6)
    setting = Setting(size, cost, given.rate, given.seconds, given.seed)
    for name in given.mixes:
        print(f"\n{given.replicas} replicas, {name}:\n")
        for line in policies(setting, MIXES[name], given.replicas):
            print(line, flush=True)
    if given.curve:
        print("\nBy prefix, mixed:\n")
        shorter = Setting(size, cost, given.rate, given.seconds / 3, given.seed)
        for line in curve(shorter, MIXES["mixed"], given.curve, front):
            print(line, flush=True)


if __name__ == "__main__":
    main()
