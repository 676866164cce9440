"""Penalties and biases: the compiled loops against plain torch, and that other rows keep every bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trunkline.kernels import adjust

Adjust = Callable[..., None]
ADJUSTERS = [adjust.adjust_reference, adjust.adjust_cpu]
NEUTRAL = (0.0, 0.0, 1.0)
Row = tuple[int, tuple[float, float, float], dict[int, float], dict[int, float]]


def change(adjuster: Adjust, logits: torch.Tensor, rows: Sequence[Row]) -> torch.Tensor:
    """``logits`` after the call; a row is (index, penalties, counts by id, biases by id)."""
    result = logits.clone()

    def listed(tables: list[dict[int, float]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        starts = torch.tensor([0, *(len(table) for table in tables)]).cumsum(0)
        ids = torch.tensor([key for table in tables for key in table], dtype=torch.int64)
        return starts, ids, torch.tensor([value for table in tables for value in table.values()], dtype=torch.float32)

    adjuster(
        result,
        torch.tensor([row[0] for row in rows], dtype=torch.int64),
        torch.tensor([row[1] for row in rows], dtype=torch.float64).reshape(-1, 3),
        *listed([row[2] for row in rows]),
        *listed([row[3] for row in rows]),
    )
    return result


@pytest.mark.parametrize("adjuster", ADJUSTERS)
def test_the_formula(adjuster: Adjust) -> None:
    logits = torch.tensor([[1.0, 1.0, -1.0, 2.0, 0.25, 0.0], [5.0] * 6])
    row: Row = (0, (0.5, 0.25, 2.0), {1: 1.0, 2: 2.0, 3: 3.0, 4: 1.0}, {3: 10.0, 0: -torch.inf, 5: 1.5})
    after = change(adjuster, logits, [row])
    assert after[0].tolist() == [-torch.inf, 0.125, -4.5, 10.125, -1.0, 1.5]
    assert after[1].tolist() == [5.0] * 6


@pytest.mark.parametrize("adjuster", ADJUSTERS)
def test_finite_logits_stay_finite_and_others_stay_as_they_are(adjuster: Adjust) -> None:
    """A tiny repetition penalty would make every positive logit infinite; NaN must reach the sampler, which sees it."""
    logits = torch.tensor([[3.0, -3.0, 0.0, -torch.inf, torch.inf, torch.nan]])
    counts = dict.fromkeys(range(6), 1.0)
    after = change(adjuster, logits, [(0, (0.0, 0.0, 5e-324), counts, {0: 1e9, 3: 1e9})])
    assert after[0, :5].tolist() == [pytest.approx(1e30), -0.0, 0.0, -torch.inf, torch.inf]
    assert after[0, 5].isnan()


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), size=st.sampled_from([1, 7, 300, 5000]), asking=st.integers(0, 6))
def test_cpu_equals_reference_and_other_rows_are_untouched(seed: int, size: int, asking: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(6, size, generator=draw) * 5
    chosen = torch.randperm(6, generator=draw)[:asking].tolist()
    rows: list[Row] = []
    for row in chosen:
        penalties = torch.rand(3, generator=draw, dtype=torch.float64) * 4 - 2
        ids, biased = (torch.randperm(size, generator=draw)[: size // 2 + 1].tolist() for _ in range(2))
        counts = {key: float(count) for count, key in enumerate(ids, 1)}
        biases = {key: -torch.inf if key % 5 == 0 else key / 7 - 20 for key in biased}
        rows.append((row, (float(penalties[0]), float(penalties[1]), abs(float(penalties[2])) + 0.01), counts, biases))
    expected = change(adjust.adjust_reference, logits, rows)
    assert torch.equal(change(adjust.adjust_cpu, logits, rows), expected)
    others = [row for row in range(6) if row not in chosen]
    assert torch.equal(expected[others], logits[others])
    if rows:
        assert not torch.equal(expected, logits)


@pytest.mark.parametrize("adjuster", ADJUSTERS)
def test_rows_that_are_not_contiguous(adjuster: Adjust) -> None:
    logits = torch.zeros(4, 10)
    view = logits[1:, ::2]
    adjuster(view, torch.tensor([1]), torch.tensor([NEUTRAL], dtype=torch.float64), torch.tensor([0, 0]),
             torch.zeros(0, dtype=torch.int64), torch.zeros(0), torch.tensor([0, 1]), torch.tensor([3]),
             torch.tensor([2.0]))  # fmt: skip
    assert logits.nonzero().tolist() == [[2, 6]]


@pytest.mark.parametrize("wrong", [-1, 10])
@pytest.mark.parametrize("penalised", [False, True])
@pytest.mark.parametrize("adjuster", [adjust.adjust_cpu])
def test_an_id_outside_the_vocabulary_writes_nowhere(adjuster: Adjust, wrong: int, penalised: bool) -> None:
    table = {wrong: 1.0}
    with pytest.raises(IndexError, match="ids to adjust"):
        change(adjuster, torch.zeros(2, 10), [(0, NEUTRAL, table if penalised else {}, {} if penalised else table)])


@pytest.mark.parametrize("masker", [adjust.mask_tokens_reference, adjust.mask_tokens_cpu])
def test_a_mask_allows_the_tokens_whose_bits_are_set(masker: Adjust) -> None:
    logits = torch.arange(3 * 35.0).reshape(3, 35)
    expected = logits.clone()
    masks = torch.tensor([[0b1010, 0b100], [-1, -1]], dtype=torch.int32)
    masker(logits, torch.tensor([2, 0]), masks)
    assert torch.isfinite(logits[2]).nonzero().flatten().tolist() == [1, 3, 34]
    assert torch.equal(logits[2][[1, 3, 34]], expected[2][[1, 3, 34]])
    assert torch.equal(logits[:2], expected[:2])


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), size=st.sampled_from([1, 31, 32, 33, 300, 5000]), count=st.integers(0, 6))
def test_masks_on_the_cpu_equal_the_reference(seed: int, size: int, count: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(6, size, generator=generator)
    logits[0, 0] = torch.nan
    words = (size + 31) // 32
    masks = torch.randint(-(2**31), 2**31, (count, words), generator=generator, dtype=torch.int64).int()
    rows = torch.randperm(6, generator=generator)[:count]
    expected, columns = logits.clone(), logits.t().contiguous().t()
    adjust.mask_tokens_reference(expected, rows, masks)
    for given_logits in (logits, columns):
        adjust.mask_tokens_cpu(given_logits, rows, masks)
        assert torch.equal(given_logits.contiguous().view(torch.int32), expected.view(torch.int32))
