"""What a request and a token cost when the model costs next to nothing, from socket to socket.

``python benchmarks/host_overhead.py`` serves a random one-layer, 32-wide Llama, so that nearly all
of the time is HTTP, tokenising, scheduling, sampling, detokenising and the hop between processes
(and the load generator's own share: it runs on the same cores). The rates are the reciprocal of
throughput: wall time divided by requests or tokens.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import torch
from http_client import Connection
from server import running
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

_PROMPT_TOKENS = 16
_EOS = "<eos>"


def make_model(folder: Path) -> None:
    """A byte-level tokenizer and the smallest decoder that every part of the path accepts."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([_EOS, *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=_EOS).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=4096,
        eos_token_id=0,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def _body(serial: int, new_tokens: int, stream: bool) -> dict[str, object]:
    """A request whose prompt no other request has (so that the prefix cache stays out of it)."""
    prompt = [1 + serial % 256, 1 + serial // 256 % 256, *range(1, _PROMPT_TOKENS - 1)]
    sampling = {"temperature": 0.0, "max_new_tokens": new_tokens, "ignore_eos": True}
    return {"input_ids": prompt, "sampling_params": sampling, "stream": stream}


async def _ask(connection: Connection, body: dict[str, object]) -> None:
    if body["stream"]:
        async for _ in connection.events("/generate", body):
            pass
        return
    status, reply = await connection.request("POST", "/generate", body)
    if status != 200:
        raise RuntimeError(f"/generate answered {status}: {reply[:500].decode(errors='replace')}")


async def _alone(base_url: str, requests: int) -> float:
    """Median seconds of a request of one token without other requests, on one connection."""
    connection = Connection(base_url)
    times: list[float] = []
    for serial in range(requests):
        start = time.perf_counter()
        await _ask(connection, _body(serial, 1, stream=False))
        times.append(time.perf_counter() - start)
    await connection.close()
    return statistics.median(times)


async def _together(base_url: str, clients: int, each: int, new_tokens: int, stream: bool) -> float:
    """Seconds for ``clients`` connections to have ``each`` requests answered, one after the other."""

    async def client(number: int) -> None:
        connection = Connection(base_url)
        for turn in range(each):
            await _ask(connection, _body(number * each + turn, new_tokens, stream))
        await connection.close()

    start = time.perf_counter()
    await asyncio.gather(*(client(number) for number in range(clients)))
    return time.perf_counter() - start


async def _median(rounds: int, function: Callable[[], Awaitable[float]]) -> float:
    return statistics.median([await function() for _ in range(rounds)])


async def measure(base_url: str, rounds: int, requests: int, tokens: int) -> None:
    """Print a line for each kind of load."""
    await _together(base_url, 32, 4, 8, True)  # warm up
    share = max(1, requests // 32)
    alone = await _median(rounds, lambda: _alone(base_url, requests))
    print(f"request, alone, 1 token             {alone * 1e6:8.0f} µs (median latency)")
    for stream in (False, True):
        way = "streamed" if stream else "whole   "
        many = await _median(rounds, lambda s=stream: _together(base_url, 32, share, 1, s))  # type: ignore[misc]
        print(f"request, 32 at once, 1 token, {way}  {many / share / 32 * 1e6:6.0f} µs a request")
    for clients in (1, 32):
        for stream in (False, True):
            way = "streamed" if stream else "whole   "
            wall = await _median(rounds, lambda c=clients, s=stream: _together(base_url, c, 1, tokens, s))  # type: ignore[misc]
            print(f"token, {clients:2d} at once, {way}           {wall / clients / tokens * 1e6:8.0f} µs a token")


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="number of counts whose median is taken")
    parser.add_argument("--requests", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=512, help="new tokens of each streamed request")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder))
        async with running(folder, ["--log-level", "warning"]) as base_url:
            await measure(base_url, options.rounds, options.requests, options.tokens)


if __name__ == "__main__":
    asyncio.run(main())
