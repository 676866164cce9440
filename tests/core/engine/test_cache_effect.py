"""What was cached before doesn't change a result.

Where a model's layers run on our own kernels, results are equal bit for bit: cold, with a cached prefix, in chunks
and in a batch; in float32, and in bfloat16 on CPUs that multiply it by our kernels. Elsewhere products sum in an
order that depends on the number of rows, and how far results lie apart is bounded here.

Both kinds of bound are in benchmarks/results/cpu-zen4.md. Those of SmolLM2 are the 99.9% of benchmarks/cache_effect.py.
BOUND, for tiny models in float32, is a little more than the largest difference that `every_way` gave of 405 prompts:
the prompts of this file, drawn with 45 seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from trunkline.core import Engine
from trunkline.core.model.attention import ForwardContext
from trunkline.core.model.fusion import decoder_forward
from trunkline.core.model.fusion.recorded import RecordedLayers
from trunkline.core.model.sources import catalogue
from trunkline.core.types import Submission
from trunkline.kernels.backend import Backend
from trunkline.kernels.cpu.processor import has_bfloat16_pairs
from trunkline.plugins.rerank.offline import rerank
from trunkline.plugins.rerank.schemas import RerankParams, RerankResult
from trunkline.plugins.reward.schemas import RewardParams, RewardResult

pytestmark = pytest.mark.field

OURS = ["llama", "llama-tied", "qwen2", "qwen3", "mistral-sliding", "gemma2", "gemma3", "phi3"]
UNFUSED = ["cohere", "granite", "gpt2", "gpt-oss", "deepseek-v3"]
LABELS = RerankParams((5, 6, 7))
BOUND = 2e-5  # of logits up to 28 in float32, where layers aren't ours; the largest of 405 prompts was 1.5e-5


def prompts() -> list[list[int]]:
    """Of 5 to 100 tokens; some share a prefix with another, up to all but its last token."""
    draw = torch.Generator().manual_seed(3)
    alone = [torch.randint(4, 500, (length,), generator=draw).tolist() for length in (5, 23, 60, 61, 64, 100)]
    return [*alone, alone[3][:33] + alone[0], [*alone[5][:99], 7], [*alone[5][:95], 7, 8, 9]]


def scores(engine: Engine, given: Sequence[list[int]], task: str = "rerank") -> list[bytes]:
    """The float32 results of prompts that are submitted at once, as bytes."""
    params: Any = LABELS if task == "rerank" else RewardParams()
    items = [Submission(prompt=prompt, params=params, rid=str(index)) for index, prompt in enumerate(given)]
    tickets = engine.submit_all(task, items)
    found = [ticket.result(60).data for ticket in tickets]
    if task == "rerank":
        return [msgspec.convert(data, RerankResult).values for data in found]
    return [msgspec.convert(data, RewardResult).scores for data in found]


def cold(engine: Engine, task: str = "rerank") -> list[bytes]:
    found = []
    for prompt in prompts():
        engine.call("flush_cache")
        found += scores(engine, [prompt], task)
    engine.call("flush_cache")
    return found


def every_way(start: Callable[..., Engine], task: str = "rerank") -> dict[str, list[bytes]]:
    """The results of the prompts cold, in batches, with cached prefixes, and in chunks of 7."""
    ways = {}
    for name, options in (("whole", {"chunked_prefill_size": -1}), ("chunks", {"chunked_prefill_size": 7})):
        with start(**options) as engine:
            ways[f"{name}, cold"] = cold(engine, task)
            ways[f"{name}, batch"] = scores(engine, prompts(), task)
            ways[f"{name}, cached"] = [scores(engine, [prompt], task)[0] for prompt in prompts()]
    return ways


def starter(folder: Path, dtype: str, **options: Any) -> Callable[..., Engine]:
    task = options.pop("task", ("rerank",))
    return lambda **more: Engine(str(folder), dtype=dtype, threads=1, task=task, **options, **more)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", OURS)
def test_results_are_equal_bit_for_bit(name: str, dtype: str, zoo: Callable[[str], Path]) -> None:
    if dtype == "bfloat16" and not has_bfloat16_pairs():
        pytest.skip("this CPU multiplies bfloat16 by other kernels")
    ways = every_way(starter(zoo(name), dtype))
    expected = ways["whole, cold"]
    assert [way for way, found in ways.items() if found != expected] == []


@pytest.mark.parametrize("name", ["llama-score", "qwen3-score", "gemma2-score"])
def test_scores_are_equal_bit_for_bit(name: str, zoo: Callable[[str], Path]) -> None:
    dtype = "bfloat16" if has_bfloat16_pairs() else "float32"
    ways = every_way(starter(zoo(name), dtype, task=("reward",)), "reward")
    expected = ways["whole, cold"]
    assert [way for way, found in ways.items() if found != expected] == []


@pytest.mark.parametrize("backend", ["cpu", "torch_native"])
@pytest.mark.parametrize("name", UNFUSED)
def test_elsewhere_results_are_close(name: str, backend: str, zoo: Callable[[str], Path]) -> None:
    ways = every_way(starter(zoo(name), "float32", attention_backend=backend))
    expected = np.frombuffer(b"".join(ways["whole, cold"]), "<f4")
    for way, found in ways.items():
        apart = np.abs(np.frombuffer(b"".join(found), "<f4") - expected).max()
        assert apart < BOUND, way


@pytest.mark.parametrize("replayed", [True, False])
def test_the_comparison_sees_a_prompt_that_takes_the_kernel_of_decoding(
    zoo: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, replayed: bool
) -> None:
    def by_queries(layout: Any) -> tuple[np.ndarray, np.ndarray]:
        single = np.diff(layout.q_start) == 1
        return np.flatnonzero(single).astype(np.int32), np.flatnonzero(~single).astype(np.int32)

    run = RecordedLayers.run

    def replay(self: RecordedLayers, x: Any, cos: Any, sin: Any, trunk: ForwardContext) -> Any:
        trunk.layout.decodes = int(np.cumprod(np.diff(trunk.layout.q_start) == 1).sum())
        return run(self, x, cos, sin, trunk)

    if replayed:
        monkeypatch.setattr(RecordedLayers, "run", replay)
    else:
        monkeypatch.setattr(decoder_forward, "can_replay", lambda *_: False)
        monkeypatch.setattr(Backend, "_split", staticmethod(by_queries))
    ways = every_way(starter(zoo("llama"), "float32"))
    assert ways["whole, cached"] != ways["whole, cold"]


# -- real models whose layers aren't ours ------------------------------------------------------

# 99.9% of 400 documents lay closer (log odds, benchmarks/results/cpu-zen4.md): cached against cold, in bfloat16.
NATIVE_BOUND = 0.2  # SmolLM2 on the backend torch_native: logits are bfloat16 there, with steps of 1/8
EXPERTS_BOUND = 0.07  # SmolLM2 with experts, whose products are torch's
SUBJECTS = ["A river", "The engine", "A cached prefix", "My neighbour", "The plan", "A slow network", "This page"]
VERBS = ["bends twice before it meets the sea", "is computed once", "answers at once", "says nothing of use"]


def furthest(model: str, **options: Any) -> float:
    """The largest difference of a document's log odds, cached and cold."""
    found = []
    with Engine(model, dtype="bfloat16", task=("rerank",), threads=1, **options) as engine:
        for document in (f"{subject} {verb}." for subject in SUBJECTS for verb in VERBS):
            engine.call("flush_cache")
            first, again = (rerank(engine, "who answers?", [document])[0]["logit"] for _ in range(2))
            found.append(abs(first - again))
    return max(found)


@pytest.mark.demo
@pytest.mark.skipif(not has_bfloat16_pairs(), reason="measured on a CPU with AVX512-BF16")
def test_smollm2_on_plain_torch_stays_within_what_was_measured() -> None:
    assert 0 < furthest("demo:smollm2-135m-instruct", attention_backend="torch_native") <= NATIVE_BOUND


@pytest.mark.demo
@pytest.mark.skipif(not has_bfloat16_pairs(), reason="measured on a CPU with AVX512-BF16")
def test_smollm2_with_experts_stays_within_what_was_measured(
    load_script: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    script = load_script("examples/moe_from_dense.py")
    with torch.no_grad():
        script.upcycle(catalogue.fetch("demo:smollm2-135m-instruct"), tmp_path)
    assert furthest(str(tmp_path)) <= EXPERTS_BOUND


@pytest.mark.demo
@pytest.mark.skipif(not has_bfloat16_pairs(), reason="bfloat16 is slow here")
def test_smollm2_does_not_depend_on_the_cache_at_all() -> None:
    assert furthest("demo:smollm2-135m-instruct") == 0
