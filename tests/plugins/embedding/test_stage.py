"""The stage alone: failures, retraction and company change no vector."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from trunkline.core import Engine
from trunkline.core.errors import RequestError
from trunkline.core.testing import run_stage
from trunkline.core.types import Needs, Part, PartRow, Request
from trunkline.kernels.backend import choose
from trunkline.plugins.embedding.offline import encode
from trunkline.plugins.embedding.recipe import MODES, Recipe
from trunkline.plugins.embedding.schemas import EmbeddingParams
from trunkline.plugins.embedding.service import vector_of
from trunkline.plugins.embedding.stage import EmbeddingStage

WIDTH = 6


def stage_of(*modes: str, normalize: bool = False) -> EmbeddingStage:
    model: Any = SimpleNamespace(
        info=SimpleNamespace(vocab_size=100, hidden_size=WIDTH),
        backend=choose(None, "cpu"),
        device=torch.device("cpu"),
        max_request_tokens=64,
    )
    return EmbeddingStage(model, Recipe(modes=modes, normalize=normalize, dimensions=WIDTH * len(modes)))


def request_of(stage: EmbeddingStage, length: int, **params: Any) -> Request:
    request = Request(1, "r", "embedding", EmbeddingParams(**params), [5] * length, length)
    request.needs = stage.admit(request)
    return request


def feed(stage: EmbeddingStage, request: Request, rows: torch.Tensor, start: int, end: int) -> list[Any]:
    """One pass over positions ``[start, end)`` of the request, alone."""
    skip = request.params.skip
    first = end - 1 if request.needs.rows_from is None else max(start, skip)
    stop = end if request.needs.rows_up_to is None else max(first, min(end, request.needs.rows_up_to))
    part = Part("embedding", [PartRow(request, start, end, first, stop, 0, end == len(rows))])
    return run_stage(stage, part, rows[first:stop])


@pytest.mark.parametrize("skip", [0, 4])
@pytest.mark.parametrize("modes", [(mode, "mean") for mode in MODES] + [("cls",)], ids="+".join)
def test_chunks_a_pass_run_twice_and_a_retraction_give_the_same(modes: tuple[str, ...], skip: int) -> None:
    stage, rows = stage_of(*modes), torch.randn(11, WIDTH)
    [whole] = feed(stage, request_of(stage, 11, skip=skip), rows, 0, 11)
    request = request_of(stage, 11, skip=skip)
    assert feed(stage, request, rows * 3, 0, 7) == []
    stage.reset(request)
    for start, end in ((0, 5), (5, 8), (5, 8)):
        assert feed(stage, request, rows, start, end) == []
    [chunked] = feed(stage, request, rows, 8, 11)
    ours, theirs = vector_of(asdict(chunked)), vector_of(asdict(whole))
    np.testing.assert_allclose(ours, theirs, atol=1e-6)
    expected = rows[skip] if modes == ("cls",) else rows[skip:].mean(0)
    np.testing.assert_allclose(theirs[-WIDTH:], expected.numpy(), atol=1e-6)


def asdict(step: Any) -> dict[str, bytes]:
    assert step.finish == {"type": "length", "length": 0}
    assert step.error is None
    return {"vector": step.data.vector}


def test_only_last_token_pooling_allows_reuse() -> None:
    others = {"lasttoken": Needs(), "cls": Needs(rows_from=2, rows_up_to=3, reuse_up_to=0)}
    for mode in MODES:
        needs = request_of(stage_of(mode), 9, skip=2).needs
        assert needs == others.get(mode, Needs(rows_from=2, reuse_up_to=0))
    assert request_of(stage_of("mean", "lasttoken"), 9).needs == Needs(rows_from=0, reuse_up_to=0)


def test_requests_of_one_pass_get_what_each_asked_for() -> None:
    stage, rows = stage_of("mean", normalize=True), torch.randn(8, WIDTH)
    asked = [{}, {"normalize": False}, {"dimensions": 2}, {"dimensions": 4, "normalize": False}]
    requests = [request_of(stage, 2, **params) for params in asked]
    part = Part("embedding", [PartRow(request, 0, 2, 0, 2, 2 * i, True) for i, request in enumerate(requests)])
    steps = run_stage(stage, part, rows)
    means = rows.reshape(4, 2, WIDTH).mean(1).numpy()
    expected = [
        means[0] / np.linalg.norm(means[0]),
        means[1],
        means[2][:2] / np.linalg.norm(means[2][:2]),
        means[3][:4],
    ]
    for step, vector in zip(steps, expected, strict=True):
        np.testing.assert_allclose(vector_of(asdict(step)), vector, atol=1e-6)


def test_a_row_that_is_not_finite_ends_its_request_only() -> None:
    stage, rows = stage_of("mean"), torch.randn(6, WIDTH)
    rows[3, 1] = torch.nan
    requests = [request_of(stage, 2) for _ in range(3)]
    part = Part("embedding", [PartRow(request, 0, 2, 0, 2, 2 * i, True) for i, request in enumerate(requests)])
    steps = run_stage(stage, part, rows)
    assert [step.error is None for step in steps] == [True, False, True]
    assert steps[1].error is not None
    assert steps[1].error.status == 500


def test_bad_requests_are_refused_at_admission() -> None:
    stage = stage_of("mean")
    with pytest.raises(RequestError, match="Nothing is left to pool"):
        request_of(stage, 3, skip=3)


def test_generation_and_embedding_share_passes_and_the_prefix_cache(
    zoo: Callable[[str], Path], engine: Callable[..., Engine]
) -> None:
    from trunkline.plugins.generation.offline import generate

    one = engine(zoo("qwen3"), task=("generation", "embedding"), chunked_prefill_size=16)
    assert one.models[0].tasks == {"generation": True, "embedding": False}
    text = "the rain in the house on the shore is a tale that he told to us all"
    alone = encode(one, [text, text[:30]])
    [record] = generate(one, [text], temperature=0, max_new_tokens=4, ignore_eos=True)
    assert record["meta_info"]["cached_tokens"] == len(one.encode(text)) - 1
    tickets = [one.submit("embedding", text, EmbeddingParams()) for _ in range(6)]
    again = generate(one, [text] * 3, temperature=0, max_new_tokens=4, ignore_eos=True)
    assert {tuple(each["output_ids"]) for each in again} == {tuple(record["output_ids"])}
    for ticket in tickets:
        np.testing.assert_allclose(vector_of(ticket.result(60).data), alone[0], atol=1e-5)


def test_offline_options(saved: Callable[..., Any], engine: Callable[..., Engine]) -> None:
    folder, _ = saved("qwen2", ("mean",))
    one = engine(folder)
    assert encode(one, []).shape == (0, 128)
    with pytest.raises(RequestError, match=r"^texts\[1\]: .* values greater than the vocab size"):
        encode(one, [[1], [1000]])
    with pytest.raises(RequestError, match="--matryoshka"):
        encode(one, ["a"], dimensions=4)
    assert np.linalg.norm(encode(one, ["a"], normalize=True)) == pytest.approx(1.0, abs=1e-5)
