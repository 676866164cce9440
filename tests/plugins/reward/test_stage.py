"""The stage with hidden rows made by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from trunkline.core.testing import run_stage
from trunkline.core.types import ModelInfo, Needs, Part, PartRow, Request
from trunkline.kernels.backend import choose
from trunkline.plugins.reward import trunkline_serves
from trunkline.plugins.reward.schemas import RewardParams
from trunkline.plugins.reward.stage import RewardStage


def info(architecture: str = "LlamaForSequenceClassification", **own: Any) -> ModelInfo:
    return ModelInfo(**{
        "path": "/", "architecture": architecture, "model_type": "llama", "context_length": 64, "vocab_size": 100,
        "hidden_size": 2, "causal": True, **own,
    })  # fmt: skip


def stage(score_rows: str) -> RewardStage:
    heads = {"score": lambda rows: rows * 2}
    model: Any = SimpleNamespace(info=info(score_rows=score_rows), backend=choose(None, "cpu"), heads=heads)
    return RewardStage(model)


def request(*ids: int) -> Request:
    return Request(key=1, rid="r", task="reward", params=RewardParams(), tokens=list(ids), prompt_len=len(ids))


def scores(stage: RewardStage, part: Part, hidden: torch.Tensor) -> list[Any]:
    steps = run_stage(stage, part, hidden)
    assert [step.request for step in steps] == [row.request for row in part.rows]
    return [step.error if step.error else np.frombuffer(step.data.scores, np.dtype("<f4")).tolist() for step in steps]


def whole(*lengths: int) -> Part:
    """Sequences that come whole, packed one after another."""
    rows, offset = [], 0
    for length in lengths:
        rows.append(PartRow(request(*range(length)), 0, length, 0, length, offset, final=True))
        offset += length
    return Part("reward", rows)


def test_what_is_needed_of_the_scheduler() -> None:
    assert stage("last").admit(request(1, 2)) == Needs()
    assert stage("first").admit(request(1, 2)) == Needs(rows_from=0, rows_up_to=1, reuse_up_to=0)
    assert stage("mean").admit(request(1, 2)) == Needs(rows_from=0, reuse_up_to=0)


def test_rows_of_each_kind() -> None:
    hidden = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    last = Part("reward", [PartRow(request(1, 2), 4, 9, 8, 9, index, final=True) for index in range(3)])
    assert scores(stage("last"), last, hidden) == [[2, 4], [6, 8], [10, 12]]
    assert scores(stage("first"), whole(2, 1), hidden) == [[2, 4], [10, 12]]
    assert scores(stage("mean"), whole(2, 1), hidden) == [[4, 6], [10, 12]]


def test_a_row_that_is_not_finite_ends_its_request_only() -> None:
    hidden = torch.tensor([[1.0, 2.0], [float("nan"), 4.0], [5.0, float("inf")]])
    fine, *broken = scores(stage("first"), whole(1, 1, 1), hidden)
    assert fine == [2, 4]
    assert [(error.status, "not finite" in error.message) for error in broken] == [(500, True)] * 2


def test_which_models_are_served() -> None:
    assert trunkline_serves(info(score_rows="last")).when == "default"
    assert trunkline_serves(info("BertForSequenceClassification", causal=False, score_rows="first")).when == "default"
    language = trunkline_serves(info("LlamaForCausalLM"))
    assert language.when == "no"
    assert language.detail.startswith("It serves /encode then; /classify needs a")
    for other in (info("LlamaForCausalLM"), info("BertModel", causal=False)):
        assert "/encode" in trunkline_serves(other).reason
        assert "--is-embedding" not in trunkline_serves(other).reason
