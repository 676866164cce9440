"""Scores are computed in float32 over the rows of a bfloat16 model, with the checkpoint's own weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from trunkline.core import Engine
from trunkline.core.model.float32 import float32_view
from trunkline.core.testing import SCORERS
from trunkline.kernels.backend import choose
from trunkline.plugins.reward.offline import classify

pytestmark = pytest.mark.field

LEVEL = 8.0  # scores near it have steps of 1/16 in bfloat16
TEXTS = [f"{word} {other}" for word in ("cat", "dog", "sun", "sea", "to") for other in ("a", "of", "in", "is", "at")]


@pytest.fixture
def folder(zoo: Callable[[str], Path], tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A scorer whose logits lie within a few steps of bfloat16 around ``LEVEL``."""
    source = zoo(request.param)
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    bias = [name for name in tensors if name in ("classifier.bias", "classifier.out_proj.bias")]
    weight = [name for name in tensors if name in ("classifier.weight", "classifier.out_proj.weight", "score.weight")]
    for name in bias:
        tensors[name] = torch.full_like(tensors[name], LEVEL)
    for name in weight:
        tensors[name] = tensors[name] * 0.1
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    return tmp_path


def watch(engine: Engine) -> list[torch.Tensor]:
    """The rows that the head "score" gets from now on, pass by pass."""
    (lane,) = engine.client.transport.loop.lanes
    head = lane.model.heads["score"]
    seen: list[torch.Tensor] = []

    def note(rows: torch.Tensor) -> torch.Tensor:
        seen.append(rows.clone())
        return head(rows)

    lane.model.heads["score"] = note
    return seen


@pytest.mark.parametrize("folder", sorted(SCORERS), indirect=True)
def test_scores_are_those_of_a_float32_head(folder: Path) -> None:
    with Engine(str(folder), dtype="bfloat16", threads=1, task=("reward",)) as engine:
        seen = watch(engine)
        for text in TEXTS:  # one by one, so that the head's calls are in their order
            found = classify(engine, [text])[0]["scores"]
            rows = seen.pop()
            assert not seen
            torch.testing.assert_close(torch.tensor([found]), head_in_float32(folder, rows), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("folder", ["bert-score", "roberta-score"], indirect=True)
def test_close_scores_stay_apart(folder: Path) -> None:
    with Engine(str(folder), dtype="bfloat16", threads=1, task=("reward",)) as engine:
        scores = [record["scores"][0] for record in classify(engine, TEXTS)]
    rounded = torch.tensor(scores).bfloat16().tolist()
    assert len(set(rounded)) < len(TEXTS) / 2, "the scores should be too close for bfloat16"
    assert len(set(scores)) == len(TEXTS)


def head_in_float32(folder: Path, rows: torch.Tensor) -> torch.Tensor:
    """What the class's own head, loaded in float32, gives for pooled hidden rows ``[1, hidden_size]``."""
    model: Any = transformers.AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    rows = rows.float()
    with torch.inference_mode():
        if hasattr(model, "score"):
            return model.score(rows)
        if hasattr(model, "pre_classifier"):
            return model.classifier(torch.relu(model.pre_classifier(rows)))
        if hasattr(model, "head"):
            return model.classifier(model.head(rows))
        pooler = getattr(model, "pooler", None) or getattr(model.base_model, "pooler", None)
        return model.classifier(rows[:, None]) if pooler is None else model.classifier(pooler(rows[:, None]))


@pytest.mark.parametrize("backend", ["cpu", "torch_native"])
def test_the_view_shares_what_is_large_and_copies_what_scores(backend: str, zoo: Callable[[str], Path]) -> None:
    folder = zoo("bert-score")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.bfloat16)
    stored = load_file(folder / "model.safetensors")
    view = float32_view(model, stored, choose(backend, "cpu"))
    assert view.bert.encoder is model.bert.encoder
    for linear, name in ((view.classifier, "classifier.weight"), (view.bert.pooler.dense, "bert.pooler.dense.weight")):
        weight = linear.weight(slice(0, linear.out_features))
        assert weight.dtype == torch.float32
        assert torch.equal(weight, stored[name])  # not rounded to bfloat16 before
    assert model.classifier.weight.dtype == model.bert.pooler.dense.weight.dtype == torch.bfloat16


def test_the_view_does_not_copy_the_vocabulary(zoo: Callable[[str], Path]) -> None:
    folder = zoo("llama")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert float32_view(model, {}, choose(None, "cpu")).lm_head is model.lm_head
