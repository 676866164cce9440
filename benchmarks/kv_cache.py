"""What ``--kv-cache-dtype int8`` saves and costs: decode steps over long contexts, memory, and perplexity.

    python benchmarks/kv_cache.py [--model random:llama-1b] [--rows 32] [--tokens 2048]

A decode step is a forward pass of ``--rows`` sequences of ``--tokens`` tokens, and their logits. The pools of both
kinds have the same random keys and values, in slots in random order, and take turns in one process. For the perplexity,
of quantisation.py's text, the model reads keys and values from the pool.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import torch
from checkpoints import LLAMA_1B, RANDOM, folder_of
from quantisation import ROW, ROWS, SMOLLM, TOPICS

from trunkline.core import Engine
from trunkline.core.cache.pool import KVPool
from trunkline.core.model.attention import paged_layout
from trunkline.core.model.loaded import LoadedModel
from trunkline.kernels.cpu.processor import has_bfloat16
from trunkline.kernels.layout import Layout

STEPS = 3  # that are measured in a row; one before them records the launches for the pool


@torch.inference_mode()
def perplexity(model: LoadedModel, kv_dtype: torch.dtype) -> float:
    """Of rows of text, each read on its own, with keys and values in a pool of this dtype."""
    assert model.tokenizer is not None
    ids = model.tokenizer.encode("\n\n".join(topics[name] for name in TOPICS))[: ROW * ROWS]
    pool, table = KVPool(model.kv_shapes, ROW, kv_dtype, "cpu"), np.arange(ROW, dtype=np.int32)[None]
    total = 0.0
    for row in torch.tensor(ids).view(ROWS, ROW):
        hidden = model.forward(row, torch.arange(ROW), paged_layout(table, [(0, ROW)]), pool)
        logits = model.heads["lm"](hidden[:-1]).float()
        total += float(torch.nn.functional.cross_entropy(logits, row[1:], reduction="sum"))
    return math.exp(total / (ROWS * (ROW - 1)))


def filled(model: LoadedModel, kv_dtype: torch.dtype, slots: int) -> KVPool:
    """A pool of random keys and values, the same for every dtype."""
    pool, noise = KVPool(model.kv_shapes, slots, kv_dtype, "cpu"), torch.Generator().manual_seed(1)
    for (heads, *dims), keys, values in zip(model.kv_shapes, pool.keys, pool.values, strict=True):
        k, v = (torch.randn(slots, heads, dim, generator=noise).to(model.dtype) for dim in dims)
        model.backend.write(k, v, keys, values, torch.arange(slots))
    return pool


@torch.inference_mode()
def step(model: LoadedModel, layout: Layout, pool: KVPool) -> None:
    """One decode step, without sampling."""
    positions = torch.from_numpy(layout.kv_len.astype(np.int64)) - 1
    model.heads["lm"](model.forward(torch.arange(layout.rows), positions, layout, pool))


@torch.inference_mode()
def attention(model: LoadedModel, layout: Layout, pool: KVPool) -> None:
    """The attention of a decode step, of all layers."""
    rows, heads = np.arange(layout.rows, dtype=np.int32), model.whole.config.num_attention_heads
    for (_, key_dim, value_dim), keys, values in zip(model.kv_shapes, pool.keys, pool.values, strict=True):
        q = torch.ones(layout.rows, heads, key_dim, dtype=model.dtype)
        out = torch.empty(layout.rows, heads, value_dim, dtype=model.dtype)
        model.backend.decode(q, keys, values, layout, rows, out, scale=key_dim**-0.5)


def measured(runs: Sequence[Callable[[], None]], rounds: int) -> list[list[float]]:
    """The seconds of each function in turns: for each, a list of one mean of STEPS calls per round."""
    seconds: list[list[float]] = [[] for _ in runs]
    for round_ in range(rounds + 1):  # round 0 warms up
        order = [(round_ + number) % len(runs) for number in range(len(runs))]
        for number in order:
            runs[number]()
            start = time.perf_counter()
            for _ in range(STEPS):
                runs[number]()
            if round_:
                seconds[number].append((time.perf_counter() - start) / STEPS)
    return seconds


def report(name: str, dtype: str, options: argparse.Namespace) -> None:
    """A row for each kind of pool."""
    with Engine(str(folder_of(name)), dtype=dtype, threads=options.threads) as engine:
        transport: Any = engine.client.transport
        model: LoadedModel = transport.loop.lanes[0].model
        kinds = {str(kind).removeprefix("torch."): kind for kind in (model.dtype, torch.int8)}
        random = name.startswith(RANDOM)  # weights, for which a perplexity means nothing
        accuracy = [math.nan if random else perplexity(model, kind) for kind in kinds.values()]
        slots = options.rows * options.tokens
        table = np.random.default_rng(0).permutation(slots).astype(np.int32).reshape(options.rows, options.tokens)
        layout = paged_layout(table, [(options.tokens - 1, options.tokens)] * options.rows)
        pools = [filled(model, kind, slots) for kind in kinds.values()]
        found = [
            measured([partial(run, model, layout, pool) for pool in pools], options.rounds) for run in (step, attention)
        ]
        sizes = [KVPool.bytes_per_token(model.kv_shapes, kind) for kind in kinds.values()]
    print(
        f"\n| {name} in {dtype}, {options.rows} × {options.tokens} | bytes per token | step, ms | plain ÷ it |", end=""
    )
    print(" attention, ms | plain ÷ it | perplexity | ÷ plain |\n|" + " --- |" * 8)
    for number, kind in enumerate(kinds):
        cells = [kind, f"{sizes[number]}"]
        for by_pool in found:
            ratio = statistics.median(a / b for a, b in zip(by_pool[0], by_pool[number], strict=True))
            cells += [f"{statistics.median(by_pool[number]) * 1e3:.1f}", f"{ratio:.2f}"]
        cells += ["", ""] if random else [f"{accuracy[number]:.3f}", f"{accuracy[number] / accuracy[0]:.4f}"]
        print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", default=[], help=f"default: {SMOLLM} and {LLAMA_1B}")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 where the CPU has it")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default all cores")
    parser.add_argument("--rows", type=int, default=32, help="sequences of a step")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of each sequence")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    dtype = options.dtype or ("bfloat16" if has_bfloat16() else "float32")
    print(f"{options.threads} threads, medians of {options.rounds} rounds, load at the start {os.getloadavg()[0]:.1f}")
    for model in options.model or [SMOLLM, LLAMA_1B]:
        report(model, dtype, options)


if __name__ == "__main__":
    main()
