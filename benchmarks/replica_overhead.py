"""What Ray costs: a server with one replica against a server without Ray, in turns.

``python benchmarks/replica_overhead.py`` prints the time of a request for one token, and the throughput of 32 streams.
Both have the same engine, so the difference is the way to the replica and back. Needs ``trunkline[ray]``.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
import time

import torch
from bench_serving import flush, run
from http_client import Connection
from scenarios import build
from server import running

BLOCK = 20  # requests of a server before the other one's turn


async def latencies(base_url: str, seed: int) -> list[float]:
    """Seconds of requests for one token, one after another."""
    draw, found = random.Random(seed), []
    connection = Connection(base_url)
    for _ in range(BLOCK):
        body = {
            "input_ids": [draw.randrange(1000, 30000) for _ in range(8)],
            "sampling_params": {"max_new_tokens": 1, "temperature": 0.0, "ignore_eos": True},
        }
        began = time.perf_counter()
        status, reply = await connection.request("POST", "/generate", body)
        found.append(time.perf_counter() - began)
        if status != 200:
            raise RuntimeError(f"/generate answered {status}: {reply[:500].decode(errors='replace')}")
    await connection.close()
    return found


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo:smollm2-135m-instruct", help="demo:NAME or a local folder")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of each engine")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the lengths of streams, for a trial run")
    options = parser.parse_args()
    flags = ["--threads", str(options.threads)]
    print(f"{options.model}, {options.threads} threads, {options.rounds} rounds, load {os.getloadavg()[0]:.1f}")
    async with (
        running(options.model, flags) as alone,
        running(options.model, [*flags, "--replicas", "1"]) as replica,
    ):
        seconds: dict[str, list[float]] = {alone: [], replica: []}
        walls: dict[str, list[float]] = {alone: [], replica: []}
        for round_ in range(options.rounds + 1):  # round 0 warms up
            turns = [alone, replica] if round_ % 2 else [replica, alone]
            for block in range(5):
                for url in turns:
                    found = await latencies(url, 100 * round_ + block)
                    seconds[url] += found if round_ else []
            streams = build(round_, scale=options.scale)[1]
            for url in turns:
                await flush(url)
                wall = (await run(url, streams)).wall
                walls[url] += [wall] if round_ else []
        one, other = (statistics.median(seconds[url]) * 1e3 for url in (alone, replica))
        ratio = statistics.median(a / b for a, b in zip(walls[alone], walls[replica], strict=True))
        print(f"a request for one token, p50: {one:.2f} ms without Ray, {other:.2f} ms with it: {other - one:+.2f} ms")
        print(f"{streams.name}: {ratio:.3f} × the throughput without Ray")


if __name__ == "__main__":
    asyncio.run(main())
