"""Penalties and biases in the checked interpreter: the reference's logits, bit by bit."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from trunkline.kernels.adjust import adjust_reference, mask_tokens_reference
from trunkline.kernels.triton import adjust


def lists(generator: torch.Generator, rows: int, vocabulary: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(starts, ids): different ids for each row, up to all of them; none for the first."""
    found = [torch.randperm(vocabulary, generator=generator)[: vocabulary * row // rows] for row in range(rows)]
    starts = torch.tensor([0, *(len(ids) for ids in found)]).cumsum(0)
    return starts, torch.cat(found)


@pytest.mark.parametrize("vocabulary", [7, 100])
def test_equals_the_reference(vocabulary: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows in another order, ids in both lists, several blocks of ids; forbidden tokens stay so, and NaN does."""
    monkeypatch.setattr(adjust, "BLOCK", 1)  # 16 in the interpreter
    generator = torch.Generator().manual_seed(vocabulary)
    logits = torch.randn(6, vocabulary, generator=generator) * 4
    logits[:, 0], logits[:, 1] = -torch.inf, torch.nan
    penalties = torch.rand(4, 3, generator=generator, dtype=torch.float64) + 0.5
    starts, ids = lists(generator, 4, vocabulary)
    bias_starts, bias_ids = lists(generator, 4, vocabulary)
    counts = torch.randint(1, 9, ids.shape, generator=generator).float()
    biases = torch.randn(bias_ids.shape, generator=generator)
    biases[::5] = -torch.inf
    rows = torch.tensor([5, 0, 3, 2])
    expected = logits.clone()
    adjust_reference(expected, rows, penalties, starts, ids, counts, bias_starts, bias_ids, biases)
    adjust.adjust(logits, rows, penalties, starts, ids, counts, bias_starts, bias_ids, biases)
    assert torch.equal(logits.view(torch.int32), expected.view(torch.int32))


@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_finite_logits_stay_finite() -> None:
    """A tiny repetition penalty would make them infinite."""
    logits, ones, none = torch.tensor([[3.0, -3.0, torch.inf]]), torch.ones(3), torch.zeros(0)
    penalties = torch.tensor([[0.0, 0.0, 5e-324]], dtype=torch.float64)
    starts, empty = torch.tensor([0, 3]), torch.tensor([0, 0])
    adjust.adjust(logits, torch.tensor([0]), penalties, starts, torch.arange(3), ones, empty, none.long(), none)
    assert logits.tolist() == [[pytest.approx(1e30), 0.0, torch.inf]]


@pytest.mark.parametrize("vocabulary", [7, 32, 100, 257])
def test_masks_equal_the_reference(vocabulary: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows in another order, several blocks, a last word that isn't full; others keep every bit, NaN too."""
    monkeypatch.setattr(adjust, "MASK_BLOCK", 4)  # 64 in the interpreter
    generator = torch.Generator().manual_seed(vocabulary)
    logits = torch.randn(6, vocabulary, generator=generator)
    logits[:, 0] = torch.nan
    words = (vocabulary + 31) // 32
    masks = torch.randint(-(2**31), 2**31, (3, words), generator=generator, dtype=torch.int64).int()
    masks[2] = -1
    rows = torch.tensor([5, 0, 3])
    expected = logits.clone()
    mask_tokens_reference(expected, rows, masks)
    adjust.mask_tokens(logits, rows, masks)
    assert torch.equal(logits.view(torch.int32), expected.view(torch.int32))
