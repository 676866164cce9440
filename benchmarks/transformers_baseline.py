"""The same scenarios through transformers' own ``generate``: one static batch each, its best case.

``python benchmarks/transformers_baseline.py FOLDER`` prints one line a scenario. With ``--pipe`` it
reads scenarios as JSON lines and answers each with a result line, for compare.py.
"""

from __future__ import annotations

import argparse
import sys
import time
from itertools import pairwise
from typing import Any

import msgspec
import torch
from bench_serving import describe, median
from scenarios import Result, Scenario, build
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList


class _Clock(StoppingCriteria):  # type: ignore[misc]  # transformers is untyped to mypy here
    """Notes when each token of the batch was known; stops nothing."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


class Baseline:
    """A causal LM in transformers with its default attention, on the CPU."""

    def __init__(self, folder: str, dtype: str) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
        self.model.generation_config.eos_token_id = None  # ignore_eos
        self.model.generation_config.pad_token_id = 0

    @torch.inference_mode()
    def run(self, scenario: Scenario) -> Result:
        """All prompts (of one length, so without padding) in one batch, greedily."""
        ids = torch.tensor(scenario.prompts)
        clock = _Clock()
        start = time.perf_counter()
        output = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=scenario.new_tokens,
            do_sample=False,
            stopping_criteria=StoppingCriteriaList([clock]),
        )
        wall = time.perf_counter() - start
        gaps = [after - before for before, after in pairwise(clock.times)]
        return Result(
            scenario=scenario.name,
            wall=wall,
            ttft=[clock.times[0] - start] * len(ids),
            itl=gaps * len(ids),
            prompt_tokens=ids.numel(),
            cached_tokens=0,
            outputs=output[:, ids.shape[1] :].tolist(),
        )


def serve_pipe(baseline: Baseline) -> None:
    """Answer scenarios on stdin with results on stdout, one JSON line each, until end of file."""
    decoder = msgspec.json.Decoder(Scenario)
    print("ready", flush=True)
    for line in sys.stdin:
        print(msgspec.json.encode(baseline.run(decoder.decode(line))).decode(), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="model folder or hub id")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--scale", type=float, default=1.0, help="factor on all lengths, for a trial run")
    parser.add_argument("--pipe", action="store_true", help="speak JSON lines with compare.py")
    options = parser.parse_args()
    baseline = Baseline(options.folder, options.dtype)
    if options.pipe:
        serve_pipe(baseline)
        return
    baseline.run(build(0, scale=0.1)[0])
    for index, scenario in enumerate(build(1, scale=options.scale)):
        rounds = [baseline.run(build(seed + 1, scale=options.scale)[index]) for seed in range(options.rounds)]
        print(f"{scenario.name:18s} {describe(scenario, median(rounds))}", flush=True)


if __name__ == "__main__":
    main()
