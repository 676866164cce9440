"""Our server and a peer's, side by side: the same requests on OpenAI's routes, in turns.

The peer's command is a template; a shell runs it. Both sides must use the same dtype::

    python benchmarks/side_by_side.py --peer 'vllm serve {model} --port {port} --dtype {dtype} --max-num-seqs 64'

Prompts are token ids, other ones in each round, so that nothing of an earlier round is in a prefix cache.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import torch
from checkpoints import BERT_BASE, LLAMA_1B, folder_of
from http_client import Connection
from scenarios import Scenario, build
from server import free_port, ready, running

from trunkline.kernels.cpu.processor import has_bfloat16

MODELS = ["demo:smollm2-135m-instruct", LLAMA_1B, "demo:all-minilm-l6-v2", BERT_BASE]
_TEXTS, _CLIENTS = 128, 16  # to embed, and how many clients send them
_CLS, _SEP = 101, 102  # with which BERT's texts begin and end

_Load = Callable[[str, str], Awaitable[None]]  # (base URL, the model's name there)


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]


@asynccontextmanager
async def peer(template: str, folder: Path, dtype: str, patience: float = 900.0) -> AsyncIterator[str]:
    """The base URL of the peer. RuntimeError with the end of its output when it doesn't get ready."""
    port = free_port()
    command, base_url = template.format(model=folder, port=port, dtype=dtype), f"http://127.0.0.1:{port}"
    with (
        tempfile.TemporaryFile() as log,
        subprocess.Popen(command, shell=True, stdout=log, stderr=subprocess.STDOUT, start_new_session=True) as process,
    ):
        try:
            if not await ready(base_url, process, time.monotonic() + patience):
                log.seek(0)
                raise RuntimeError(f"the peer did not start:\n{log.read()[-4000:].decode(errors='replace')}")
            yield base_url
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                await asyncio.to_thread(process.wait, 30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


async def name_of(base_url: str) -> str:
    """The name of the model that a server has."""
    connection = Connection(base_url)
    _, body = await connection.request("GET", "/v1/models")
    await connection.close()
    return msgspec.json.decode(body, type=_Models).data[0].id


async def post(connection: Connection, path: str, body: dict[str, Any]) -> bytes:
    """The reply. RuntimeError unless its status is 200."""
    status, reply = await connection.request("POST", path, body)
    if status != 200:
        raise RuntimeError(f"{path} answered {status}: {reply[:500].decode(errors='replace')}")
    return reply


def generating(scenario: Scenario) -> _Load:
    """All requests of the scenario at once, on /v1/completions, streamed."""

    async def one(connection: Connection, name: str, prompt: list[int]) -> None:
        body = {"model": name, "prompt": prompt, "max_tokens": scenario.new_tokens, "temperature": 0.0}
        body |= {"ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
        usage: dict[str, Any] = {}
        async for event in connection.events("/v1/completions", body):
            usage = msgspec.json.decode(event).get("usage") or usage
        await connection.close()
        if usage.get("completion_tokens") != scenario.new_tokens:
            raise RuntimeError(f"asked for {scenario.new_tokens} tokens, got {usage}")

    async def load(base_url: str, name: str) -> None:
        await asyncio.gather(*(one(Connection(base_url), name, prompt) for prompt in scenario.prompts))

    return load


def embedding(seed: int, scale: float) -> _Load:
    """Texts of 8 to 256 tokens, one request each; a client sends the next one when it has the reply to its last."""
    draw = random.Random(seed)
    lengths = [draw.randint(8, 256) for _ in range(max(1, round(_TEXTS * scale)))]
    texts = iter([[_CLS, *(draw.randrange(2000, 28000) for _ in range(length - 2)), _SEP] for length in lengths])

    async def client(base_url: str, name: str) -> None:
        connection = Connection(base_url)
        for text in texts:
            await post(connection, "/v1/embeddings", {"model": name, "input": text})
        await connection.close()

    async def load(base_url: str, name: str) -> None:
        await asyncio.gather(*(client(base_url, name) for _ in range(_CLIENTS)))

    return load


def loads(folder: Path, seed: int, scale: float) -> dict[str, _Load]:
    """By name, for a decoder or a text encoder."""
    if (folder / "modules.json").exists():
        return {f"{_TEXTS} texts": embedding(seed, scale)}
    return {scenario.name: generating(scenario) for scenario in build(seed, scale=scale)}


async def compare(model: str, dtype: str, options: argparse.Namespace) -> None:
    """Print a row for each load of the model."""
    folder = folder_of(model)
    flags = ["--dtype", dtype, "--threads", str(options.threads)]
    seconds: dict[str, dict[str, list[float]]] = {}
    async with peer(options.peer, folder, dtype) as theirs, running(str(folder), flags) as ours:
        sides = [(url, await name_of(url)) for url in (ours, theirs)]
        for round_ in range(options.rounds + 1):  # round 0 warms up
            turns = sides if round_ % 2 else sides[::-1]
            for url, name in turns:
                for load_name, load in loads(folder, round_, options.scale if round_ else options.scale / 4).items():
                    began = time.perf_counter()
                    await load(url, name)
                    if round_:
                        seconds.setdefault(load_name, {}).setdefault(url, []).append(time.perf_counter() - began)
    for load_name, by_side in seconds.items():
        mine, yours = by_side[ours], by_side[theirs]
        ratio = statistics.median(b / a for a, b in zip(mine, yours, strict=True))
        times = f"{statistics.median(mine):.2f} | {statistics.median(yours):.2f}"
        print(f"| {model} | {load_name} | {times} | {ratio:.2f} ({min(yours) / min(mine):.2f}) |", flush=True)


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", required=True, help="a shell command with {model}, {port} and {dtype}")
    parser.add_argument("--model", action="append", default=[], help=f"default: {', '.join(MODELS)}")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 where the CPU has it")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of ours; the peer's: its command")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0, help="factor on all lengths, for a trial run")
    options = parser.parse_args()
    dtype = options.dtype or ("bfloat16" if has_bfloat16() else "float32")
    print(f"{dtype}, lengths × {options.scale}, medians of {options.rounds} rounds, load {os.getloadavg()[0]:.1f}\n")
    print("| model | load | ours, s | peer, s | peer ÷ ours (of the fastest) |\n| --- | --- | --- | --- | --- |")
    for model in options.model or MODELS:
        await compare(model, dtype, options)


if __name__ == "__main__":
    asyncio.run(main())
