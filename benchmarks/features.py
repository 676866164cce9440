"""What sampling features cost: the time of a decode pass of 64 rows over the demo model's 49,152 ids, by feature.

``python benchmarks/features.py [MODEL]`` runs the engine in this process and the variants in turns, each round in
another order, so that all meet the same neighbours. A step is one token for every row. The share is the part of the
step that the features take: how much longer it is than one that uses nothing, divided by its own length.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import time
import uuid
from collections.abc import Sequence
from typing import Any

from msgspec.structs import replace

from trunkline.core import Engine
from trunkline.core.types import Submission
from trunkline.plugins.generation.schemas import GenerationParams, LogprobParams

ROWS = 64
PROMPT = 64  # tokens
FILTERS: dict[str, Any] = {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "min_p": 0.02}
PENALTIES: dict[str, Any] = {"frequency_penalty": 0.3, "presence_penalty": 0.2, "repetition_penalty": 1.1}
BIAS: dict[str, Any] = {"logit_bias": tuple((3 + 7 * index, 0.5) for index in range(64)), "min_new_tokens": 8}
LOGPROBS: dict[str, Any] = {"logprobs": LogprobParams(top=5)}
VARIANTS: dict[str, dict[str, Any]] = {
    "nothing (greedy)": {"temperature": 0.0},
    "temperature": {"temperature": 0.8},
    "top-k, top-p, min-p": FILTERS,
    "those, penalties": FILTERS | PENALTIES,
    "greedy, top-5 logprobs": {"temperature": 0.0} | LOGPROBS,
    "all, with logit bias": FILTERS | PENALTIES | BIAS | LOGPROBS,
}


def prompts(engine: Engine, rows: int) -> list[list[int]]:
    """Random ids, the same ones in every run, so that all but a token of each prompt is cached."""
    draw = random.Random(0)
    size = engine.models[0].info.vocab_size
    return [[draw.randrange(size // 2) for _ in range(PROMPT)] for _ in range(rows)]


def step_seconds(engine: Engine, texts: Sequence[list[int]], features: dict[str, Any], steps: int) -> float:
    """Seconds of a step: all rows begin together, and each takes ``steps`` of them."""
    params = GenerationParams(max_new_tokens=steps, ignore_eos=True, **features)
    items = [
        Submission(prompt=list(text), params=replace(params, seed=index), rid=uuid.uuid4().hex)
        for index, text in enumerate(texts)
    ]
    begin = time.perf_counter()
    tickets = engine.submit_all("generation", items)
    for ticket in tickets:
        ticket.result(timeout=600)
    return (time.perf_counter() - begin) / steps


def measure(engine: Engine, rows: int, steps: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of a step by variant, one value a round."""
    texts = prompts(engine, rows)
    names = list(VARIANTS)
    for name in names:  # compiles kernels, fills the cache
        step_seconds(engine, texts, VARIANTS[name], 4)
    found: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        first = turn % len(names)
        for name in [*names[first:], *names[:first]]:
            found[name].append(step_seconds(engine, texts, VARIANTS[name], steps))
        print(f"round {turn + 1}: {', '.join(f'{found[name][-1] * 1e3:.1f}' for name in names)} ms", flush=True)
    return found


def table(found: dict[str, list[float]]) -> str:
    """Lower quartiles: the time of a pass without load from other processes."""
    quiet = {name: quartile(times) for name, times in found.items()}
    plain = quiet[next(iter(VARIANTS))]
    lines = ["| features | ms per pass | of the pass |", "|---|---|---|"]
    lines += [f"| {name} | {own * 1e3:.1f} | {(own - plain) / own:.1%} |" for name, own in quiet.items()]
    return "\n".join(lines)


def quartile(times: list[float]) -> float:
    """The value that a quarter of them is below."""
    return statistics.quantiles(times, n=4, method="inclusive")[0] if len(times) > 1 else times[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo:smollm2-135m-instruct", help="demo:NAME or a local folder")
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--steps", type=int, default=24, help="new tokens of each row in a run")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--dtype", default="auto")
    options = parser.parse_args()
    if (load := os.getloadavg()[0]) > 0.5:
        print(f"The machine is busy (load {load:.1f}): times will be worse than it could, shares unsteady.")
    with Engine(options.model, task=("generation",), dtype=options.dtype, max_running_requests=options.rows) as engine:
        found = measure(engine, options.rows, options.steps, options.rounds)
        served = engine.models[0]
        size = served.info.vocab_size
        print(f"\n{options.model} in {served.dtype}, {options.rows} rows, {size} ids, {options.rounds} rounds")
    print(table(found))


if __name__ == "__main__":
    main()
