from __future__ import annotations

from typing import Any

import pytest
import torch

from trunkline.core.engine.candidates import Candidate
from trunkline.core.engine.memory import CPU_LIMIT, plan
from trunkline.core.errors import ModelError
from trunkline.core.model.loader import ModelPlan
from trunkline.core.settings import ModelSettings
from trunkline.core.types import ModelInfo, ModelSource

GIB = 1 << 30


def model(
    name: str, weight_bytes: int, token_bytes: int, context: int, *, tokens: int | None = None, pass_tokens: int = -1
) -> Candidate:
    source: Any = ModelSource(name, name)
    info = ModelInfo(
        path=name, architecture="", model_type="", context_length=context, vocab_size=8, hidden_size=8, causal=True
    )
    settings = ModelSettings(model_path=name, max_total_tokens=tokens, chunked_prefill_size=pass_tokens)
    sizes = ModelPlan(weight_bytes, [], token_bytes, torch.float32, 1)
    return Candidate(settings, source, source, info, [], {}, sizes)


def test_the_budget_is_forty_percent_of_what_the_weights_leave() -> None:
    (grant,) = plan([model("a", 2 * GIB, 1 << 20, 1 << 20)], available=7 * GIB)
    assert grant.slots == 2 * GIB // (1 << 20)
    assert grant.kv_bytes == 2 * GIB
    assert grant.context == grant.slots  # the context doesn't fit and is reduced


def test_the_budget_is_capped() -> None:
    (grant,) = plan([model("a", 0, 1 << 10, 1 << 22)], available=100 * GIB)
    assert grant.kv_bytes == CPU_LIMIT


def test_small_contexts_get_no_more_than_they_can_use() -> None:
    (grant,) = plan([model("a", 0, 64, 512)], available=100 * GIB)
    assert grant.slots == 16 * 512


def test_models_share_evenly_and_those_without_cache_get_none() -> None:
    first, second, encoder = plan(
        [
            model("a", GIB, 1 << 20, 1 << 20),
            model("b", GIB, 1 << 10, 1 << 22),
            model("e", GIB, 0, 512, pass_tokens=2048),
        ],
        available=100 * GIB,
    )
    assert first.kv_bytes == second.kv_bytes == CPU_LIMIT // 2
    assert (encoder.kv_bytes, encoder.slots, encoder.context) == (0, 2048, 512)


def test_a_pass_of_a_model_without_cache_holds_one_text_at_least() -> None:
    (grant,) = plan([model("e", GIB, 0, 8192, pass_tokens=2048)], available=2 * GIB)
    assert (grant.slots, grant.context) == (8192, 8192)
    (asked,) = plan([model("e", GIB, 0, 8192, tokens=100, pass_tokens=2048)], available=2 * GIB)
    assert (asked.slots, asked.context) == (100, 100)


def test_asked_for_tokens_are_granted_and_the_rest_is_shared() -> None:
    first, second = plan(
        [model("a", 0, 1 << 20, 4096, tokens=1000), model("b", 0, 1 << 20, 1 << 20)],
        available=100 * GIB,
        budget=2000 << 20,
    )
    assert (first.slots, first.context) == (1000, 1000)
    assert second.slots == 1000


@pytest.mark.parametrize(
    ("candidate", "available", "words"),
    [
        (model("big", 9 * GIB, 1, 1), 8 * GIB, "weights need 9.00 GiB"),
        (model("wide", 0, 8 * GIB, 100), 8 * GIB, "No room for the KV cache of wide"),
        (model("deep", GIB, 1 << 20, 100, tokens=8 << 10), 8 * GIB, "KV pools of 8.00 GiB"),
    ],
)
def test_what_cannot_fit_is_refused_with_numbers(candidate: Candidate, available: int, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        plan([candidate], available=available)
