"""In the deterministic mode, a request has the same tokens and bits alone and in any schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from msgspec import structs

from trunkline.core import Engine
from trunkline.core.engine.candidates import choose_backend
from trunkline.core.errors import ConfigError, ModelError
from trunkline.core.model import loader
from trunkline.core.model.fusion.decoder_layer import FusedLayer
from trunkline.core.settings import ModelSettings
from trunkline.core.types import Submission
from trunkline.kernels import backend
from trunkline.plugins.generation.offline import generate
from trunkline.plugins.generation.schemas import GenerationParams, LogprobParams
from trunkline.plugins.rerank.schemas import RerankParams

from .schedules import BOUNDARY, GRAMMARS, LONG_ROPE, MODELS, TASK_OF, Schedule, engines, long_rope, run, schedules

Run = Callable[[Schedule], None]
UNHURRIED: Any = {"suppress_health_check": list(HealthCheck), "deadline": None}
INT8_CACHE = ("llama", "mistral-sliding", "bert", "qwen3-base", "llama-score")
QUANTISED = ("llama", "qwen3-moe", "gpt2", "bert", "llama-score")
LONG: dict[str, int] = {"float32": 120, "bfloat16": 80, "int8": 40, "int8 cache": 30}  # schedules


@pytest.fixture(scope="session")
def zoo(zoo: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The function from a checkpoint's name to its folder, which also knows :data:`LONG_ROPE`."""
    folder = long_rope(tmp_path_factory.mktemp("long") / LONG_ROPE)
    return lambda name: folder if name == LONG_ROPE else zoo(name)


@contextmanager
def runner(zoo: Callable[[str], Path], models: Sequence[str], dtype: str, **options: Any) -> Iterator[Run]:
    with engines([zoo(name) for name in models], dtype, **options) as (alone, together):
        yield lambda schedule: run(alone, together, models, schedule)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_schedules(dtype: str, zoo: Callable[[str], Path]) -> None:
    with runner(zoo, MODELS, dtype) as run_one:
        given(schedules(MODELS))(settings(max_examples=3, phases=[Phase.generate], **UNHURRIED)(run_one))()


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_schedules_of_quantised_models(quantization: str, zoo: Callable[[str], Path]) -> None:
    with runner(zoo, QUANTISED, "float32", quantization=quantization) as run_one:
        given(schedules(QUANTISED))(settings(max_examples=3, phases=[Phase.generate], **UNHURRIED)(run_one))()


def test_schedules_with_an_int8_cache(zoo: Callable[[str], Path]) -> None:
    with runner(zoo, INT8_CACHE, "float32", kv_cache_dtype="int8") as run_one:
        given(schedules(INT8_CACHE))(settings(max_examples=3, phases=[Phase.generate], **UNHURRIED)(run_one))()


@pytest.mark.faults
@pytest.mark.parametrize("numbers", LONG)
def test_hundreds_of_schedules(numbers: str, zoo: Callable[[str], Path]) -> None:
    models = list(TASK_OF)
    options: dict[str, Any] = {
        "int8": {"dtype": "float32", "quantization": "int8"},
        "int8 cache": {"dtype": "bfloat16", "kv_cache_dtype": "int8"},
    }.get(numbers, {"dtype": numbers})
    with runner(zoo, models, **options) as run_one:
        given(schedules(models))(settings(max_examples=LONG[numbers], **UNHURRIED)(run_one))()


def test_grammars_and_other_sampling(zoo: Callable[[str], Path]) -> None:
    params = GenerationParams(max_new_tokens=24, top_p=0.8, logprobs=LogprobParams(top=3))
    kinds: list[dict[str, Any]] = [
        *({"grammar": grammar, "temperature": temperature} for grammar in GRAMMARS for temperature in (0.0, 1.0)),
        {"grammar": GRAMMARS[0], "frequency_penalty": 0.7, "presence_penalty": 0.4, "logit_bias": ((12, 3.0),)},
        {"repetition_penalty": 1.4, "logit_bias": ((12, 3.0), (13, -2.0)), "min_p": 0.05},
        {"ignore_eos": True},
    ]
    asked = [
        (
            0,
            Submission(
                prompt=list(range(4, 9 + 8 * number)), params=structs.replace(params, seed=number, **kind), rid=""
            ),
        )
        for number, kind in enumerate(kinds)
    ]
    with runner(zoo, ["llama"], "float32") as run_one:
        run_one(Schedule(asked, [3, 2], [("retract", 0)]))
        run_one(Schedule(asked[::-1], [], []))


def test_lengths_across_the_boundary_of_long_rope(zoo: Callable[[str], Path]) -> None:
    """Short, long, and some that cross the boundary while they are decoded; then all begin with what is cached."""
    params = GenerationParams(max_new_tokens=20, temperature=0.0, ignore_eos=True, logprobs=LogprobParams(top=3))
    lengths = (20, BOUNDARY - 10, BOUNDARY - 1, BOUNDARY, BOUNDARY + 1, 90)
    prompt = [4 + 37 * number % 490 for number in range(max(lengths))]
    asked = [(0, Submission(prompt=prompt[:length], params=params, rid="")) for length in lengths]
    with runner(zoo, [LONG_ROPE], "float32") as run_one:
        run_one(Schedule(asked, [2], [("retract", 0)]))
        run_one(Schedule(asked[::-1], [], []))


@pytest.fixture
def default_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mode has the default kernel for rows with one query, whose sums depend on the batch."""
    wrong = replace(backend.CPU_DETERMINISTIC, decode=backend.CPU.decode)
    monkeypatch.setattr(backend, "CPU_DETERMINISTIC", wrong)


@pytest.mark.usefixtures("default_decode")
def test_schedules_show_a_kernel_that_depends_on_the_batch(
    zoo: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "verify_rows", lambda *_: None)
    params = GenerationParams(max_new_tokens=20, temperature=0.0, ignore_eos=True, logprobs=LogprobParams(top=3))
    asked = [(0, Submission(prompt=list(range(4, 30 + 7 * n)), params=params, rid="")) for n in range(5)]
    with runner(zoo, ["llama"], "float32") as run_one, pytest.raises(AssertionError, match="has other bits alone"):
        run_one(Schedule(asked, [], []))


@pytest.mark.usefixtures("default_decode")
def test_such_a_kernel_is_found_at_load(zoo: Callable[[str], Path]) -> None:
    with pytest.raises(ModelError, match="depend on the other texts of a batch, or on how a text is divided"):
        Engine(str(zoo("llama")), dtype="float32", enable_deterministic_inference=True)


@pytest.mark.parametrize("cache", ["auto", "int8"])
def test_passes_that_differ_from_recorded_ones_are_found_at_load(
    cache: str, zoo: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small passes are recorded, large ones aren't."""
    compute = FusedLayer.compute
    monkeypatch.setattr(FusedLayer, "compute", lambda *given: compute(*given) * (1 + 1e-5))
    with pytest.raises(ModelError, match="depend on the other texts of a batch, or on how a text is divided"):
        Engine(str(zoo("llama")), dtype="float32", enable_deterministic_inference=True, kv_cache_dtype=cache)


@pytest.mark.parametrize(
    ("name", "reason"), [("deepseek-v2", "torch's polar may give"), ("mpnet", "two matrices neither of which")]
)
def test_models_that_call_other_operations_are_refused(name: str, reason: str, zoo: Callable[[str], Path]) -> None:
    with pytest.raises(ModelError, match=f"can't be served with --enable-deterministic-inference: .*{reason}"):
        Engine(str(zoo(name)), dtype="float32", enable_deterministic_inference=True)


def test_gpus_are_refused() -> None:
    message = (
        "llama can't be served with --enable-deterministic-inference: the attention backend 'cpu' on the device 'cuda"
    )
    one = ModelSettings(model_path="llama", attention_backend="cpu", enable_deterministic_inference=True)
    with pytest.raises(ModelError, match=message):
        choose_backend(one, torch.device("cuda"), 64)


@pytest.mark.parametrize("other", ["torch_native", "triton"])
def test_other_backends_are_refused(other: str, zoo: Callable[[str], Path]) -> None:
    with pytest.raises(ConfigError, match=f"--attention-backend {other}: leave one of the two out"):
        Engine(str(zoo("llama")), attention_backend=other, enable_deterministic_inference=True)


def test_requests_without_a_seed(zoo: Callable[[str], Path]) -> None:
    """Their seed is 42, as in SGLang; the samples of one request differ."""
    sampling: dict[str, Any] = {"temperature": 1.0, "max_new_tokens": 12, "ignore_eos": True}
    with Engine(str(zoo("llama")), dtype="float32", threads=1, enable_deterministic_inference=True) as engine:
        first, second = generate(engine, [[5, 6, 7]], n=2, **sampling)
        for options in ({}, {}, {"sampling_seed": 42}):
            (again,) = generate(engine, [[5, 6, 7]], **sampling, **options)
            assert again["output_ids"] == first["output_ids"] != second["output_ids"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scores_from_label_logits(dtype: str, zoo: Callable[[str], Path]) -> None:
    """Their stage calls torch's logsumexp."""
    options: dict[str, Any] = {"dtype": dtype, "task": ("rerank",), "chunked_prefill_size": 16}
    with Engine(str(zoo("qwen3-yes-no")), enable_deterministic_inference=True, **options) as engine:
        items = [
            Submission(prompt=list(range(4, 10 + 7 * number)), params=RerankParams((7, 9)), rid=f"{number}")
            for number in range(9)
        ]
        alone = []
        for item in items:
            engine.call("flush_cache")
            alone.append(engine.submit_all("rerank", [item])[0].result(60).results)
        assert [ticket.result(60).results for ticket in engine.submit_all("rerank", items)] == alone


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_after_an_update_of_the_weights(name: str, zoo: Callable[[str], Path], other: Callable[[str], Path]) -> None:
    """Packed copies of the old weights aren't used any more."""
    options: dict[str, Any] = {"dtype": "float32", "threads": 1, "enable_deterministic_inference": True}
    prompts = [[5, 6, 7], list(range(4, 60))]

    def answers(engine: Engine) -> Any:
        records = generate(engine, prompts, max_new_tokens=12, temperature=0.0, ignore_eos=True)
        return [record["output_ids"] for record in records]

    with Engine(str(other(name)), **options) as engine:
        expected = answers(engine)
    with Engine(str(zoo(name)), **options) as engine:
        assert answers(engine) != expected
        assert engine.call("update_weights", model_path=str(other(name)))["success"]
        assert answers(engine) == expected
