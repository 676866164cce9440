"""Do long prompts delay the requests that decode beside them? Latencies under arrivals at random, and at once.

``python benchmarks/latency.py`` starts the server and puts it under two loads: Poisson arrivals, where one prompt in
ten is long, and 32 arrivals at once. ``--against FOLDER`` runs another checkout of trunkline in turns under the same
arrivals (``git worktree add FOLDER COMMIT``), ``--url`` a server that is running already and speaks ``/generate``.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path

from bench_serving import flush, stream_one, token_gaps
from http_client import Connection
from scenarios import percentile
from server import running

LOW, HIGH = 1000, 30000  # ids of prompts


@dataclass
class Load:
    """Requests by the second at which each arrives."""

    name: str
    arrivals: list[tuple[float, list[int]]]
    new_tokens: int


@dataclass
class Latencies:
    """Of all rounds; seconds. ``tokens`` in ``wall`` seconds."""

    ttft: list[float] = field(default_factory=list)
    itl: list[float] = field(default_factory=list)
    tokens: int = 0
    wall: float = 0.0

    def __str__(self) -> str:
        ttft, itl = (
            " / ".join(f"{percentile(values, share) * 1e3:5.0f}" for share in (0.5, 0.95, 0.99))
            for values in (self.ttft, self.itl)
        )
        worst = percentile(self.itl, 0.99) / percentile(self.itl, 0.5)
        return f"TTFT {ttft}   ITL {itl}   p99 is {worst:4.1f} × p50   {self.tokens / self.wall:6.1f} tok/s"


def poisson(seed: int, options: argparse.Namespace) -> Load:
    """``--rate`` requests per second for ``--seconds``; one prompt in ten has 1024 tokens, the others 128."""
    draw = random.Random(seed)
    arrivals, now = [], 0.0
    while now < options.seconds:
        length = 1024 if draw.random() < 0.1 else 128
        arrivals.append((now, [draw.randrange(LOW, HIGH) for _ in range(length)]))
        now += draw.expovariate(options.rate)
    return Load(f"Poisson, {options.rate:g} requests/s, prompts of 128 and 1024", arrivals, 64)


def at_once(seed: int) -> Load:
    draw = random.Random(seed)
    return Load("32 at once, 128→128", [(0.0, [draw.randrange(LOW, HIGH) for _ in range(128)]) for _ in range(32)], 128)


async def measure(base_url: str, load: Load, found: Latencies) -> None:
    """Send each request when it arrives."""
    await flush(base_url)
    began = time.perf_counter()

    async def send(at: float, prompt: list[int]) -> None:
        await asyncio.sleep(max(0.0, began + at - time.perf_counter()))
        connection = Connection(base_url)
        sent = time.perf_counter()
        try:
            timed = await stream_one(connection, prompt, load.new_tokens)
        finally:
            await connection.close()
        found.ttft.append(timed.arrivals[0][0] - sent)
        found.itl += token_gaps(timed.arrivals)
        found.tokens += load.new_tokens

    await asyncio.gather(*(send(at, prompt) for at, prompt in load.arrivals))
    found.wall += time.perf_counter() - began


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo:smollm2-135m-instruct", help="demo:NAME or a local folder")
    parser.add_argument("--rate", type=float, default=2.2, help="requests per second")
    parser.add_argument("--seconds", type=float, default=40.0, help="of Poisson arrivals in a round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--flag", action="append", default=[], help="for our server, as in --flag=--max-stall-ms=20")
    parser.add_argument("--against", type=Path, metavar="FOLDER", help="compare with this checkout of trunkline")
    parser.add_argument("--url", action="append", default=[], help="compare with a server that is running; repeatable")
    options = parser.parse_args()
    async with AsyncExitStack() as stack:
        servers = {"trunkline": await stack.enter_async_context(running(options.model, options.flag))}
        if options.against:
            other = running(options.model, source=options.against)
            servers[options.against.name] = await stack.enter_async_context(other)
        servers |= {url: url for url in options.url}
        await compare(servers, options)


async def compare(servers: dict[str, str], options: argparse.Namespace) -> None:
    """All loads on all servers in turns, then the table."""
    for url in servers.values():
        await measure(url, at_once(0), Latencies())  # warm up
    names: Sequence[str] = []
    for index in range(2):
        found = {name: Latencies() for name in servers}
        for seed in range(1, options.rounds + 1):
            load = (poisson(seed, options), at_once(seed))[index]
            names = [*servers] if seed % 2 else [*reversed(servers)]
            for name in names:
                await measure(servers[name], load, found[name])
        print(f"\n{load.name}: ms p50 / p95 / p99")
        for name in servers:
            print(f"  {name:12s}  {found[name]}")


if __name__ == "__main__":
    asyncio.run(main())
