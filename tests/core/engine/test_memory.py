from __future__ import annotations

from typing import Any

import pytest
import torch

from trunkline.core.engine import memory
from trunkline.core.engine.candidates import Candidate
from trunkline.core.engine.device.base import Memory
from trunkline.core.engine.memory import CPU_LIMIT, MemoryPlan, MemoryShare
from trunkline.core.model.sizes.plan import ModelPlan
from trunkline.core.settings import ModelSettings
from trunkline.core.types import ModelInfo, ModelSource
from trunkline.kernels import backend

GIB = 1 << 30
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def model(
    name: str,
    weight_bytes: int,
    token_bytes: int,
    context: int,
    *,
    tokens: int | None = None,
    pass_tokens: int = -1,
    activations: tuple[int, int] = (0, 0),
    dtype: torch.dtype = torch.float32,
    running: int | None = None,
) -> Candidate:
    """``activations``: bytes of a token, and of a row of logits."""
    source: Any = ModelSource(name, name)
    info = ModelInfo(
        path=name, architecture="", model_type="", context_length=context, vocab_size=8, hidden_size=8, causal=True
    )
    settings = ModelSettings(
        model_path=name, max_total_tokens=tokens, chunked_prefill_size=pass_tokens, max_running_requests=running
    )
    sizes = ModelPlan(weight_bytes, [], token_bytes, dtype, 1, {}, *activations)
    return Candidate(settings, source, source, info, [], {}, sizes, 2048, backend.CPU)


def plan(*candidates: Candidate, available: int, **options: Any) -> list[MemoryShare]:
    """The shares on a CPU with this much memory."""
    planned = memory.plan(candidates, CPU, Memory(1 << 50, available), **options)
    assert planned.problem == ""
    return list(planned.shares)


def on_gpu(*candidates: Candidate, total: int, available: int | None = None, **options: Any) -> MemoryPlan:
    return memory.plan(candidates, GPU, Memory(total, total if available is None else available), **options)


def test_the_budget_is_forty_percent_of_what_the_weights_leave() -> None:
    (share,) = plan(model("a", 2 * GIB, 1 << 20, 1 << 20), available=7 * GIB)
    assert share.slots == 2 * GIB // (1 << 20)
    assert share.kv_bytes == 2 * GIB
    assert share.context == share.slots  # the context doesn't fit and is reduced


def test_the_budget_is_capped() -> None:
    (share,) = plan(model("a", 0, 1 << 10, 1 << 22), available=100 * GIB)
    assert share.kv_bytes == CPU_LIMIT


def test_small_contexts_get_no_more_than_they_can_use() -> None:
    (share,) = plan(model("a", 0, 64, 512), available=100 * GIB)
    assert share.slots == 16 * 512


def test_a_fraction_on_a_cpu_is_of_the_available_memory() -> None:
    (share,) = plan(model("a", 2 * GIB, 1 << 20, 1 << 20), available=100 * GIB, fraction=0.5)
    assert share.kv_bytes == 48 * GIB


def test_models_share_evenly_and_those_without_cache_get_none() -> None:
    first, second, encoder = plan(
        model("a", GIB, 1 << 20, 1 << 20),
        model("b", GIB, 1 << 10, 1 << 22),
        model("e", GIB, 0, 512, pass_tokens=2048),
        available=100 * GIB,
    )
    assert first.kv_bytes == second.kv_bytes == CPU_LIMIT // 2
    assert (encoder.kv_bytes, encoder.slots, encoder.context) == (0, 2048, 512)


def test_a_pass_of_a_model_without_cache_holds_one_text_at_least() -> None:
    (share,) = plan(model("e", GIB, 0, 8192, pass_tokens=2048), available=2 * GIB)
    assert (share.slots, share.context) == (8192, 8192)
    (asked,) = plan(model("e", GIB, 0, 8192, tokens=100, pass_tokens=2048), available=2 * GIB)
    assert (asked.slots, asked.context) == (100, 100)


def test_asked_for_tokens_are_granted_and_the_rest_is_shared() -> None:
    first, second = plan(
        model("a", 0, 1 << 20, 4096, tokens=1000),
        model("b", 0, 1 << 20, 1 << 20),
        available=100 * GIB,
        pool_bytes=2000 << 20,
    )
    assert (first.slots, first.context) == (1000, 1000)
    assert second.slots == 1000


def test_pools_of_a_gpu_take_the_rest_of_the_fraction() -> None:
    planned = on_gpu(model("a", 20 * GIB, 1 << 20, 64), total=100 * GIB)
    assert planned.shares[0].kv_bytes == 68 * GIB  # 88% of the memory, and more than 16 contexts
    assert on_gpu(model("a", 20 * GIB, 1 << 20, 64), total=100 * GIB, fraction=0.5).shares[0].kv_bytes == 30 * GIB


def test_what_others_use_of_a_gpu_is_not_ours() -> None:
    planned = on_gpu(model("a", 20 * GIB, 1 << 20, 64), total=100 * GIB, available=90 * GIB, fraction=0.5)
    assert planned.shares[0].kv_bytes == 20 * GIB


def test_all_models_of_a_gpu_share_one_budget() -> None:
    planned = on_gpu(model("a", 10 * GIB, 1 << 20, 64), model("b", 20 * GIB, 1 << 10, 64), total=100 * GIB)
    assert [share.kv_bytes for share in planned.shares] == [29 * GIB, 29 * GIB]


@pytest.mark.parametrize("device", [CPU, GPU])
def test_a_pass_must_fit_beside_weights_and_pools(device: torch.device) -> None:
    """The largest pass of any model: a token's activations for each token, logits for each running request."""
    first = model("a", GIB, 1 << 20, 1 << 20, pass_tokens=1024, activations=(1 << 20, 1 << 20), running=512)
    second = model("b", GIB, 1 << 20, 1 << 20, pass_tokens=2048, activations=(1 << 18, 0))
    planned = memory.plan([first, second], device, Memory(10 * GIB, 10 * GIB), fraction=1.0)
    assert planned.activations == GIB * 3 // 2
    tables = (512 + 256) * (1 << 20) * 4  # on a GPU, slots by request and position
    assert planned.pools == 13 * GIB // 2 - (tables if device == GPU else 0)
    assert planned.problem == ""


@pytest.mark.parametrize(
    ("candidates", "available", "words"),
    [
        ([model("big", 9 * GIB, 1, 1)], 8 * GIB, ["weights need 9.00 GiB", "Choose --dtype bfloat16."]),
        ([model("big", 9 * GIB, 1, 1, dtype=torch.bfloat16)], 8 * GIB, ["Choose a smaller model, or a device with"]),
        ([model("big", 9 * GIB, 1, 1), model("b", GIB, 1, 1)], 8 * GIB, ["10.00 GiB", "Load fewer models or choose"]),
        ([model("e", 7 * GIB, 0, 64, activations=(GIB, 0))], 8 * GIB, ["Lower --chunked-prefill-size"]),
        ([model("wide", 0, 8 * GIB, 100)], 8 * GIB, ["No room for the KV cache of wide"]),
        ([model("deep", GIB, 1 << 20, 100, tokens=8 << 10)], 8 * GIB, ["KV pools of 8.00 GiB", "--max-total-tokens"]),
    ],
)
def test_what_cannot_fit_is_said_with_numbers(candidates: list[Candidate], available: int, words: list[str]) -> None:
    planned = memory.plan(candidates, CPU, Memory(8 * GIB, available))
    assert [one for one in words if one not in planned.problem] == []
    assert planned.lines()  # it can be shown, too


def test_on_a_gpu_the_fraction_or_others_may_be_the_reason() -> None:
    assert "Raise --mem-fraction-static" in on_gpu(model("a", 9 * GIB, 1, 1), total=10 * GIB, fraction=0.5).problem
    busy = on_gpu(model("a", 9 * GIB, 1, 1), total=10 * GIB, available=5 * GIB)
    assert "Free memory that other processes use" in busy.problem


def test_the_table() -> None:
    planned = on_gpu(
        model("a", 20 * GIB, 1 << 20, 4096, pass_tokens=1024, activations=(1 << 20, 0)),
        model("encoder", GIB, 0, 512, pass_tokens=2048),
        total=100 * GIB,
        available=99 * GIB,
    )
    assert planned.lines() == [
        "memory of cuda:0: 100.00 GiB, 99.00 GiB available, 87.00 GiB of it for weights and KV pools",
        "model      dtype    weights    KV pool  tokens  context  full requests  activations",
        "a        float32  20.00 GiB  66.00 GiB  67,584    4,096             16     1.00 GiB",
        "encoder  float32   1.00 GiB       none   2,048      512              4     0.00 GiB",
        "weights 21.00 GiB + KV pools 66.00 GiB + activations 1.00 GiB (an estimate) = 88.00 GiB",
    ]


def test_the_table_shows_a_reduced_context_and_what_cannot_be_planned() -> None:
    small = on_gpu(model("a", 0, 1 << 20, 4096, tokens=1000), total=100 * GIB)
    assert "1,000 of 4,096" in small.lines()[2]
    assert small.rows()[0]["full_requests"] == 0
    (row,) = on_gpu(model("a", 200 * GIB, 1 << 20, 4096), total=100 * GIB).lines()[2:-1]
    assert row.split() == ["a", "float32", "200.00", "GiB", "-", "-", "4,096", "-", "0.00", "GiB"]
