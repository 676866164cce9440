"""What recording expert choices costs: the same work with and without, turn by turn.

``python benchmarks/experts.py [MODEL]`` generates with a mixture of experts inside this process, by
default a random one of eight layers.
Rounds with recording on and off alternate, so that what else the machine does hits both; printed
are the medians, and the median of the pairs' ratios.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from trunkline.core import Engine
from trunkline.plugins.generation.offline import generate
from trunkline.plugins.moe_stats import offline

VOCABULARY = 1024


def make_model(folder: Path) -> None:
    """Eight layers of 64 experts, 8 a token; small enough that counting has a chance to show."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=512,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        moe_intermediate_size=192,
        num_experts=64,
        num_experts_per_tok=8,
        max_position_embeddings=4096,
    )
    Qwen3MoeForCausalLM(config).save_pretrained(folder)


def seconds(engine: Engine, rows: int, new_tokens: int) -> float:
    """One round: ``rows`` requests in one batch, every prompt computed anew."""
    engine.call("flush_cache")
    prompts = [[1 + row, *range(2, 34)] for row in range(rows)]
    began = time.perf_counter()
    generate(engine, prompts, max_new_tokens=new_tokens, temperature=0, ignore_eos=True)
    return time.perf_counter() - began


def measure(engine: Engine, rows: int, new_tokens: int, pairs: int) -> tuple[list[float], list[float]]:
    """Seconds of rounds without and with recording; which comes first alternates."""
    without: list[float] = []
    recorded: list[float] = []
    for pair in range(pairs):
        for on in (False, True) if pair % 2 else (True, False):
            if on:
                offline.start(engine)
            (recorded if on else without).append(seconds(engine, rows, new_tokens))
            if on:
                offline.stop(engine)
    return without, recorded


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", nargs="?", help="a local folder")
    parser.add_argument("--mode", default="stat", choices=["stat", "per_pass", "per_token"])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16], help="requests in a batch")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--dtype", default="auto")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        if given.model is None:
            make_model(Path(name))
        with Engine(given.model or name, dtype=given.dtype, expert_distribution_recorder_mode=given.mode) as engine:
            for rows in given.rows:
                measure(engine, rows, given.new_tokens, 1)  # warms up
                without, recorded = measure(engine, rows, given.new_tokens, given.pairs)
                ratio = statistics.median(on / off for off, on in zip(without, recorded, strict=True))
                print(
                    f"{given.mode}, {rows} rows: off {statistics.median(without) * 1e3:.1f} ms, "
                    f"on {statistics.median(recorded) * 1e3:.1f} ms, ratio of pairs {ratio:.3f}"
                )


if __name__ == "__main__":
    main()
