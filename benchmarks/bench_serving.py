"""Load any server that speaks ``POST /generate`` and print rates, latencies and the cached share.

``python benchmarks/bench_serving.py http://127.0.0.1:30000``
"""

from __future__ import annotations

import argparse
import asyncio
import time
from itertools import pairwise
from typing import Any

import msgspec
from http_client import Connection
from scenarios import Result, Scenario, build, percentile


class _Meta(msgspec.Struct):
    completion_tokens: int
    prompt_tokens: int
    cached_tokens: int = 0
    finish_reason: dict[str, Any] | None = None


class _Frame(msgspec.Struct):
    meta_info: _Meta
    output_ids: list[int] = []


_decode = msgspec.json.Decoder(_Frame).decode


class Timed(msgspec.Struct):
    """One request: when (time.perf_counter) how many tokens were there, and the last frame."""

    arrivals: list[tuple[float, int]]
    last: _Frame


async def run(base_url: str, scenario: Scenario) -> Result:
    """All requests of ``scenario`` at once, each on a connection of its own."""
    connections = [Connection(base_url) for _ in scenario.prompts]
    start = time.perf_counter()
    try:
        pairs = zip(connections, scenario.prompts, strict=True)
        timed = await asyncio.gather(*(stream_one(each, prompt, scenario.new_tokens) for each, prompt in pairs))
    finally:
        for connection in connections:
            await connection.close()
    wall = max(each.arrivals[-1][0] for each in timed) - start
    return Result(
        scenario=scenario.name,
        wall=wall,
        ttft=[each.arrivals[0][0] - start for each in timed],
        itl=[gap for each in timed for gap in token_gaps(each.arrivals)],
        prompt_tokens=sum(each.last.meta_info.prompt_tokens for each in timed),
        cached_tokens=sum(each.last.meta_info.cached_tokens for each in timed),
        outputs=[each.last.output_ids for each in timed],
    )


async def stream_one(connection: Connection, prompt: list[int], new_tokens: int) -> Timed:
    """One streamed request. RuntimeError if it fails, or gives another number of tokens."""
    body = {
        "input_ids": prompt,
        "sampling_params": {"temperature": 0.0, "max_new_tokens": new_tokens, "ignore_eos": True},
        "stream": True,
    }
    arrivals: list[tuple[float, int]] = []
    last = None
    async for data in connection.events("/generate", body):
        try:
            last = _decode(data)
        except msgspec.ValidationError:  # an error frame has no meta_info
            raise RuntimeError(f"the stream ended with {data.decode(errors='replace')[:500]}") from None
        known = arrivals[-1][1] if arrivals else 0
        if last.meta_info.completion_tokens > known:
            arrivals.append((time.perf_counter(), last.meta_info.completion_tokens))
    if last is None or last.meta_info.completion_tokens != new_tokens:
        raise RuntimeError(f"asked for {new_tokens} tokens, got {last and last.meta_info}")
    return Timed(arrivals, last)


def token_gaps(arrivals: list[tuple[float, int]]) -> list[float]:
    """Seconds a token for every token after the first frame; a frame of k tokens counts k times."""
    gaps: list[float] = []
    for (before, had), (now, has) in pairwise(arrivals):
        gaps += [(now - before) / (has - had)] * (has - had)
    return gaps


async def flush(base_url: str) -> None:
    """Empty the prefix cache. A server without that route is left alone."""
    connection = Connection(base_url)
    await connection.request("POST", "/flush_cache")
    await connection.close()


def describe(scenario: Scenario, result: Result) -> str:
    """One line: rate of what the scenario is about, TTFT, ITL, cached share."""
    if scenario.new_tokens > 1:
        rate = f"{result.new_tokens / result.wall:8.1f} new tok/s"
    else:
        rate = f"{result.prompt_tokens / result.wall:8.1f} prompt tok/s"
    ttft, itl = (
        " / ".join(f"{percentile(values, share) * 1e3:.0f}" for share in (0.5, 0.95, 0.99))
        for values in (result.ttft, result.itl)
    )
    line = f"{rate}  {result.wall:6.2f} s  TTFT ms p50/95/99 {ttft}"
    if scenario.new_tokens > 1:
        line += f"  ITL ms {itl}"
    return f"{line}  cached {result.cached_tokens / max(1, result.prompt_tokens):.0%}"


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base_url", nargs="?", default="http://127.0.0.1:30000")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each scenario; the median by wall time counts")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on all lengths, for a trial run")
    parser.add_argument("--max-token-id", type=int, default=30000, help="prompts hold ids below this")
    options = parser.parse_args()
    results: dict[str, list[Result]] = {}
    scenarios: list[Scenario] = []
    for seed in range(options.rounds + 1):  # round 0 warms up
        scenarios = build(
            seed, scale=options.scale, low=min(1000, options.max_token_id // 2), high=options.max_token_id
        )
        for scenario in scenarios:
            await flush(options.base_url)
            result = await run(options.base_url, scenario)
            if seed:
                results.setdefault(scenario.name, []).append(result)
    for scenario in scenarios:
        print(f"{scenario.name:18s} {describe(scenario, median(results[scenario.name]))}")


def median(results: list[Result]) -> Result:
    """The run whose wall time is the median."""
    return sorted(results, key=lambda each: each.wall)[len(results) // 2]


if __name__ == "__main__":
    asyncio.run(main())
