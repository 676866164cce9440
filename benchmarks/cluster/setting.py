"""What is simulated, and replayed over real replicas: their size and speed, the traffic, and for how long."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.events import Outcome, Simulation
from cluster.policies import Policy
from cluster.replica import Cost, Replica, Size
from cluster.trace import read_trace
from cluster.traffic import Session


@dataclass(frozen=True)
class Setting:
    """``seconds``: arrivals after them aren't sent, and those in the first quarter aren't counted."""

    size: Size
    cost: Cost
    seconds: float

    @property
    def start(self) -> float:
        """Seconds after which requests count."""
        return self.seconds / 4

    def simulate(
        self, make: Callable[[Sequence[Replica]], Policy], sessions: Sequence[Session], count: int, *, scale: int = 1
    ) -> Outcome:
        """Simulate ``count`` replicas, each ``scale`` times as large and fast."""
        replicas = [Replica(name, self.size, self.cost, scale=scale) for name in replica_names(count)]
        return Simulation(replicas, make(replicas)).run(sessions, start=self.start, end=self.seconds)


def replica_names(count: int) -> list[str]:
    """The order of equally loaded replicas depends on these."""
    return [f"replica-{index}" for index in range(count)]


def add_arguments(parser: ArgumentParser, size: Size, cost: Cost, *, seconds: float, rate: float) -> None:
    """Options for size, cost and traffic, with these defaults."""
    parser.add_argument("--replicas", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=seconds)
    parser.add_argument("--rate", type=float, default=rate, help="generated sessions per second and replica")
    parser.add_argument("--seed", type=int, default=1, help="of generated traffic")
    parser.add_argument("--slots", type=int, default=size.slots, help="tokens of a replica's KV pool")
    parser.add_argument("--chunk", type=int, default=size.chunk, help="tokens of a pass")
    parser.add_argument("--running", type=int, default=size.running, help="requests that a replica runs")
    parser.add_argument("--longest", type=int, default=size.longest, help="tokens of a request; longer ones are cut")
    parser.add_argument("--fixed-ms", type=float, default=1e3 * cost.fixed, help="of a pass")
    parser.add_argument("--token-ms", type=float, default=1e3 * cost.per_token, help="per token of a pass")
    parser.add_argument("--decode-ms", type=float, default=1e3 * cost.per_decode, help="per decoding row of a pass")
    parser.add_argument("--trace", type=Path, help="recorded requests, see benchmarks/cluster/trace.py")
    parser.add_argument("--trace-block", type=int, default=512, help="tokens of a block of the trace")
    parser.add_argument("--trace-speed", type=float, default=1.0, help="the trace's times are divided by it")


def setting_of(given: Namespace) -> Setting:
    """The setting of these options."""
    cost = Cost(given.fixed_ms / 1e3, given.token_ms / 1e3, given.decode_ms / 1e3)
    return Setting(Size(given.slots, given.chunk, given.running, given.longest), cost, given.seconds)


def trace_of(given: Namespace) -> list[Session]:
    """The recorded sessions of these options."""
    return read_trace(given.trace, block=given.trace_block, speed=given.trace_speed, longest=given.longest)
