"""Do long prompts and other tasks delay the requests that decode beside them? Latencies under arrivals at random.

``python benchmarks/latency.py`` starts the server and puts it under three loads: Poisson arrivals, where one prompt in
ten is long, without other tasks and with embeddings of a second model, and 32 arrivals at once. ``--against FOLDER``
runs another checkout of trunkline in turns under the same arrivals (``git worktree add FOLDER COMMIT``),
``--url`` a server that is running already, has the same models and speaks ``/generate``. ``--peer COMMAND`` runs
another server in turns with ours, on OpenAI's routes (side_by_side.py), without other tasks.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
from bench_serving import flush, stream_one, token_gaps
from checkpoints import folder_of
from http_client import Connection
from scenarios import percentile
from server import running
from side_by_side import name_of, peer

LOW, HIGH = 1000, 30000  # ids of prompts
EMBEDDER = "demo:all-minilm-l6-v2"
WORDS = ["server", "cache", "prefix", "request", "batch", "token", "model", "answer", "question", "document"]


@dataclass
class Arrival:
    """A request at a second: a prompt to continue, or ``path`` and ``body`` of another task."""

    at: float
    prompt: list[int] = field(default_factory=list)
    path: str = ""
    body: object = None


@dataclass
class Load:
    name: str
    arrivals: list[Arrival]
    new_tokens: int


@dataclass
class Latencies:
    """Of all rounds; seconds. ``tokens`` in ``wall`` seconds; ``others``: of whole requests of other tasks."""

    ttft: list[float] = field(default_factory=list)
    itl: list[float] = field(default_factory=list)
    others: list[float] = field(default_factory=list)
    tokens: int = 0
    wall: float = 0.0

    def __str__(self) -> str:
        worst = percentile(self.itl, 0.99) / percentile(self.itl, 0.5)
        line = f"TTFT {_percentiles(self.ttft)}   ITL {_percentiles(self.itl)}   p99 is {worst:4.1f} × p50"
        line += f"   {self.tokens / self.wall:6.1f} tok/s"
        return line + f"   others {_percentiles(self.others)}" if self.others else line


def _percentiles(values: list[float]) -> str:
    return " / ".join(f"{percentile(values, share) * 1e3:5.0f}" for share in (0.5, 0.95, 0.99))


def poisson(seed: int, options: argparse.Namespace, *, others: bool) -> Load:
    """``--rate`` requests per second for ``--seconds``; one prompt in ten has 1024 tokens, the others 128.

    ``others``: and as many requests of other tasks.
    """
    draw = random.Random(seed)
    arrivals, now = [], 0.0
    while now < options.seconds:
        length = 1024 if draw.random() < 0.1 else 128
        arrivals.append(Arrival(now, _ids(draw, length)))
        if others:
            arrivals.append(_other(draw, now + draw.expovariate(options.rate)))
        now += draw.expovariate(options.rate)
    mixed = ", as many other tasks" if others else ""
    return Load(f"Poisson, {options.rate:g} requests/s, prompts of 128 and 1024{mixed}", arrivals, 64)


def _other(draw: random.Random, at: float) -> Arrival:
    """A question of 10 words or eight texts of 50 words, to embed."""
    count, words = draw.choice([(1, 10), (8, 50)])
    texts = [" ".join(draw.choices(WORDS, k=words)) for _ in range(count)]
    return Arrival(at, path="/v1/embeddings", body={"model": EMBEDDER, "input": texts})


def at_once(seed: int) -> Load:
    draw = random.Random(seed)
    return Load("32 at once, 128→128", [Arrival(0.0, _ids(draw, 128)) for _ in range(32)], 128)


def _ids(draw: random.Random, length: int) -> list[int]:
    return [draw.randrange(LOW, HIGH) for _ in range(length)]


@dataclass(frozen=True)
class Server:
    """``model``: its name on OpenAI's routes, which are used then; "" = ``/generate``."""

    url: str
    model: str = ""

    async def stream(self, prompt: list[int], new_tokens: int) -> list[tuple[float, int]]:
        """When (time.perf_counter) how many tokens of a request were there."""
        connection = Connection(self.url)
        try:
            if not self.model:
                return (await stream_one(connection, prompt, new_tokens)).arrivals
            body = {"model": self.model, "prompt": prompt, "max_tokens": new_tokens, "temperature": 0.0}
            body |= {"ignore_eos": True, "stream": True}
            # A frame is a token: both servers send one for each as long as their reader keeps up.
            return [(time.perf_counter(), number) async for number in _numbers(connection, body)]
        finally:
            await connection.close()


async def _numbers(connection: Connection, body: dict[str, object]) -> AsyncIterator[int]:
    number = 0
    async for event in connection.events("/v1/completions", body):
        if msgspec.json.decode(event).get("choices"):
            number += 1
            yield number


async def measure(server: Server, load: Load, found: Latencies) -> None:
    """Send each request when it arrives."""
    if not server.model:
        await flush(server.url)
    began = time.perf_counter()

    async def send(arrival: Arrival) -> None:
        await asyncio.sleep(max(0.0, began + arrival.at - time.perf_counter()))
        sent = time.perf_counter()
        if arrival.path:
            await other(arrival)
            found.others.append(time.perf_counter() - sent)
            return
        arrivals = await server.stream(arrival.prompt, load.new_tokens)
        found.ttft.append(arrivals[0][0] - sent)
        found.itl += token_gaps(arrivals)
        found.tokens += load.new_tokens

    async def other(arrival: Arrival) -> None:
        connection = Connection(server.url)
        status, content = await connection.request("POST", arrival.path, arrival.body)
        await connection.close()
        if status != 200:
            raise RuntimeError(f"{arrival.path} answered {status}: {content[:500].decode(errors='replace')}")

    await asyncio.gather(*map(send, load.arrivals))
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
    parser.add_argument("--peer", default="", help="a shell command with {model}, {port} and {dtype}")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="of ours and the peer's; default: the model's")
    options = parser.parse_args()
    async with AsyncExitStack() as stack:
        dtype = ["--dtype", options.dtype] if options.dtype else []
        flags = [*dtype, EMBEDDER, *options.flag]
        servers = {"trunkline": Server(await stack.enter_async_context(running(options.model, flags)))}
        if options.against:
            other = running(options.model, [*dtype, EMBEDDER], source=options.against)
            servers[options.against.name] = Server(await stack.enter_async_context(other))
        servers |= {url: Server(url) for url in options.url}
        if options.peer:
            started = peer(options.peer, folder_of(options.model), options.dtype or "auto")
            url = await stack.enter_async_context(started)
            servers["peer"] = Server(url, await name_of(url))
        await compare(servers, options)


async def compare(servers: dict[str, Server], options: argparse.Namespace) -> None:
    """All loads on all servers in turns, then the table."""
    for server in servers.values():
        await measure(server, at_once(0), Latencies())  # warm up
    names: Sequence[str] = []
    makers = (
        lambda seed: poisson(seed, options, others=False),
        lambda seed: poisson(seed, options, others=True),
        at_once,
    )
    for maker in makers:
        found = {name: Latencies() for name in servers}
        for seed in range(1, options.rounds + 1):
            load = maker(seed)
            able = [name for name in servers if not (servers[name].model and any(one.path for one in load.arrivals))]
            names = able if seed % 2 else able[::-1]
            for name in names:
                await measure(servers[name], load, found[name])
        print(f"\n{load.name}: ms p50 / p95 / p99")
        for name in sorted(names, key=[*servers].index):
            print(f"  {name:12s}  {found[name]}", flush=True)


if __name__ == "__main__":
    asyncio.run(main())
