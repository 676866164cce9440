"""The stages by themselves: which rows, which values, and what isn't finite."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from trunkline.core.errors import RequestError
from trunkline.core.testing import run_stage
from trunkline.core.types import Needs, Part, PartRow, Request, Step
from trunkline.kernels.backend import choose
from trunkline.plugins.rerank import stage as stages
from trunkline.plugins.rerank.schemas import RerankParams
from trunkline.plugins.rerank.stage import LabelStage, ScoreStage


def model(**heads: Any) -> Any:
    info = SimpleNamespace(score_rows="first", vocab_size=6)
    return SimpleNamespace(info=info, backend=choose(None, "cpu"), heads=heads)


def request(labels: tuple[int, ...] = (), tokens: tuple[int, ...] = (1, 2, 3)) -> Request:
    return Request(
        key=1, rid="r", task="rerank", params=RerankParams(labels), tokens=list(tokens), prompt_len=len(tokens)
    )


def part(*lengths: int, labels: tuple[tuple[int, ...], ...] = ()) -> Part:
    rows, offset = [], 0
    for index, length in enumerate(lengths):
        rows.append(PartRow(request(labels[index] if labels else ()), 0, length, 0, length, offset, True))
        offset += length
    return Part("rerank", rows)


def values(step: Step) -> list[float]:
    assert step.finish == {"type": "length", "length": 0}
    return [float(value) for value in np.frombuffer(step.data.values, "<f4")]


@pytest.mark.parametrize(
    ("rows", "needs", "wanted"),
    [
        ("first", Needs(rows_from=0, rows_up_to=1, reuse_up_to=0), [0.0, 3.0]),
        ("mean", Needs(rows_from=0, reuse_up_to=0), [1.0, 3.5]),
    ],
)
def test_rows_of_a_score_head(rows: str, needs: Needs, wanted: list[float]) -> None:
    fake = model(score=lambda hidden: hidden[:, :1])
    fake.info.score_rows = rows
    stage = ScoreStage(fake)
    assert stage.admit(request()) == needs
    steps = run_stage(stage, part(3, 2), torch.arange(5.0)[:, None].expand(5, 4))
    assert [values(step) for step in steps] == [[one] for one in wanted]


def test_a_causal_score_head_wants_the_last_row_only() -> None:
    fake = model(score=lambda hidden: hidden[:, :1])
    fake.info.score_rows = "last"
    stage = ScoreStage(fake)
    assert stage.admit(request()) == Needs()
    assert [values(step) for step in run_stage(stage, part(1, 1), torch.tensor([[5.0], [7.0]]))] == [[5.0], [7.0]]


@pytest.mark.parametrize("slice_bytes", [1, 48, 1 << 20])
def test_labels_of_each_request(slice_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many rows a slice has; requests have their own labels, and as many as they like."""
    monkeypatch.setattr(stages, "SLICE_BYTES", slice_bytes)
    sizes: list[int] = []

    def head(hidden: torch.Tensor) -> torch.Tensor:
        sizes.append(len(hidden))
        return hidden

    stage = LabelStage(model(lm=head))
    labels = ((5,), (0, 3, 3), (2, 1))
    hidden = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
    steps = run_stage(stage, part(1, 1, 1, labels=labels), hidden)
    for step, ids, logits in zip(steps, labels, hidden, strict=True):
        assert values(step) == pytest.approx([*logits[list(ids)].tolist(), float(logits.logsumexp(0))], abs=1e-6)
    assert max(sizes) == {1: 1, 48: 2, 1 << 20: 3}[slice_bytes]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_ends_its_request_only(bad: float) -> None:
    stage = ScoreStage(model(score=lambda hidden: hidden[:, :1]))
    first, second = run_stage(stage, part(1, 1), torch.tensor([[bad], [7.0]]))
    assert first.error is not None
    assert first.error.status == 500
    assert values(second) == [7.0]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ((), "label_token_ids must be provided"),
        ((6,), r"Token ID 6 is out of vocabulary \(vocab size: 6\)"),
    ],
)
def test_what_is_refused(labels: tuple[int, ...], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        LabelStage(model()).admit(request(labels, (1,)))
