"""Start-up runs every variant of a kernel that requests need later."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("triton")

from trunkline.core import Engine
from trunkline.core.engine.device.graphs import DecodeGraphs
from trunkline.core.types import Submission
from trunkline.kernels.triton import cost, plans
from trunkline.kernels.triton.launch import LONGEST
from trunkline.plugins.embedding.schemas import EmbeddingParams
from trunkline.plugins.generation.schemas import GenerationParams, LogprobParams
from trunkline.plugins.generation.stage import GenerationStage

from .variants import Variant, recorded

Found = set[tuple[str, Variant]]  # kernels and their variants


def requests(dice: random.Random, names: Sequence[str]) -> list[tuple[str, str, Submission]]:
    """Requests of several tasks for the models ``names``: (model, task, what is submitted)."""
    made: list[tuple[str, str, Submission]] = []
    for number in range(12):
        prompt = [dice.randrange(4, 500) for _ in range(dice.choice([1, 2, 16, 40]))]
        generation = GenerationParams(
            max_new_tokens=dice.choice([1, 2, 5]),
            temperature=dice.choice([0.0, 0.9]),
            top_k=dice.choice([-1, 7]),
            top_p=dice.choice([1.0, 0.8]),
            frequency_penalty=dice.choice([0.0, 0.7]),
            logit_bias=dice.choice([(), ((5, 1.0), (6, 2.0))]),
            logprobs=dice.choice([None, LogprobParams(), LogprobParams(start=0, top=3, ids=(5, 6, 7))]),
            ignore_eos=True,
        )
        chosen: dict[str, tuple[str, Any]] = {
            "llama": ("generation", generation),
            "gemma2": ("generation", generation),
            "gpt2": ("generation", generation),  # not fused: a single token has other strides
            "bert": ("embedding", EmbeddingParams()),
        }
        name = dice.choice(names)
        task, params = chosen[name]
        made.append((name, task, Submission(prompt=prompt, params=params, rid=str(number))))
    return made


def serve(
    zoo: Callable[[str], Path], names: Sequence[str], seeds: int
) -> tuple[set[tuple[str, Variant]], set[tuple[str, Variant]]]:
    """(variants of start-up, variants of serving)."""
    options = {"dtype": "float32", "attention_backend": "triton", "chunked_prefill_size": 32}
    with recorded(run=True) as compiled:
        engine = Engine(*(str(zoo(name)) for name in names), **options)
    with engine, recorded(run=True) as launched:
        assert {model.attention_backend for model in engine.models} == {"triton"}
        for seed in range(seeds):
            tickets = [
                engine.submit_all(task, [one], model=str(zoo(name)))[0]
                for name, task, one in requests(random.Random(seed), names)
            ]
            for ticket in tickets:
                ticket.result(timeout=120)
    first, later = ({(name, one) for name in found for one in found[name]} for found in (compiled, launched))
    return first, later


@pytest.fixture(autouse=True)
def real_splits(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Long rows are divided, but not in graphs, which is how it may be on a GPU."""
    real = cost.splits
    monkeypatch.setattr(
        cost,
        "splits",
        lambda architecture, plan, work, bounds, multiprocessors: 1 if bounds or work.longest <= 32 else 2,
    )
    return real


@pytest.mark.compile
@pytest.mark.timeout(600)
def test_serving_compiles_nothing(zoo: Callable[[str], Path]) -> None:
    compiled, launched = serve(zoo, ("gemma2", "gpt2", "bert"), seeds=3)
    assert {name for name, _ in launched} >= {
        "split_kernel",
        "combine_kernel",
        "extend_kernel",
        "sample_kernel",
    }
    assert launched - compiled == set()


@pytest.mark.compile
@pytest.mark.timeout(600)
def test_a_kernel_that_is_left_out_is_noticed(zoo: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GenerationStage, "warm_up", lambda self: [self.probe()])
    monkeypatch.setattr(DecodeGraphs, "run_bounds", lambda self: None)
    compiled, launched = serve(zoo, ("llama",), seeds=1)
    missing = {name for name, _ in launched - compiled}
    assert missing >= {"logprobs_kernel", "penalise_kernel", "bias_kernel", "combine_kernel"}


@pytest.mark.parametrize("architecture", cost.GPUS)
@pytest.mark.parametrize("heads", [(32, 8, 128), (32, 32, 128), (9, 3, 64), (16, 16, 256), (64, 8, 128)])
def test_the_longest_row_alone_is_divided_if_any_are(
    architecture: str, heads: tuple[int, int, int], real_splits: Callable[..., int]
) -> None:
    """So start-up runs both variants of decode attention that passes may need."""
    dice = random.Random(0)
    count, groups, width = heads

    def splits(lengths: list[int]) -> int:
        work = cost.DecodeWork.of(np.array(lengths, np.int32), LONGEST, count, groups, 4 * width, width)
        return real_splits(architecture, plans.decode(architecture, width, 2), work, False)

    for context in (300, 512, 1000, 2048, 4096, 8192, 32768, 131072):
        if splits([context]) > 1:
            assert splits([1]) == 1
            continue
        for _ in range(200):
            lengths = [dice.randint(1, context) for _ in range(dice.choice([1, 2, 3, 8, 64]))]
            assert splits(lengths) == 1, (context, lengths)
