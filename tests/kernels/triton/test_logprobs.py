"""Log-probabilities in the checked interpreter, against the float64 reference."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from trunkline.kernels.logprobs import logprobs_reference
from trunkline.kernels.triton import plans
from trunkline.kernels.triton.logprobs import logprobs

from .tolerances import DTYPES

ROWS, TEMPERATURES = torch.tensor([5, 0, 3, 3, 1]), torch.tensor([1.0, 0.0, 0.5, 0.0, 3.0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", [7, 300])
def test_equals_the_reference(vocabulary: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ties in several blocks of a row, forbidden ids, ids outside of the vocabulary."""
    monkeypatch.setattr(plans, "vocabulary", lambda *_: plans.Plan(block_n=128))
    generator = torch.Generator().manual_seed(vocabulary)
    logits = ((torch.randn(6, vocabulary, generator=generator) * 4).round() / 2).to(dtype)
    logits[:, ::3] = -torch.inf
    chosen = torch.tensor([1, 0, vocabulary - 1, vocabulary, -1])
    ids = torch.randint(-2, vocabulary + 2, (5, 70), generator=generator)
    for top in (0, 3, 20):
        expected = logprobs_reference(logits, ROWS, TEMPERATURES, chosen, top, ids)
        result = logprobs(logits, ROWS, TEMPERATURES, chosen, top, ids)
        assert torch.equal(result.top_ids, expected.top_ids)
        for name in ("chosen", "top", "ids"):
            torch.testing.assert_close(
                getattr(result, name), getattr(expected, name), atol=1e-5, rtol=1e-5, equal_nan=True
            )


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_broken_rows_are_nan(value: float) -> None:
    logits = torch.zeros(3, 9)
    logits[1, 4], logits[2] = value, -torch.inf
    result = logprobs(logits, torch.arange(3), torch.ones(3), torch.zeros(3).long(), 2, torch.zeros(3, 1).long())
    for part in (result.chosen[:, None], result.top, result.ids):
        assert part.isnan().all(-1).tolist() == [False, True, True]
    assert result.top_ids[0].tolist() == [0, 1]


def test_more_of_the_most_likely_ids_than_a_kernel_finds() -> None:
    logits = torch.randn(2, 200, generator=torch.Generator().manual_seed(0))
    arguments = (torch.arange(2), torch.ones(2), torch.zeros(2).long(), 100, torch.zeros(2, 0).long())
    assert torch.equal(logprobs(logits, *arguments).top_ids, logprobs_reference(logits, *arguments).top_ids)
