"""Pooling of packed rows against float64, sequence by sequence."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from trunkline.kernels.pool import MODES, pool_cpu, pool_reference

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-5, torch.float16: 1e-5}  # the results are float32


def plainly(rows: torch.Tensor, mode: str) -> torch.Tensor:
    """One sequence's vector, as the name of the mode says."""
    n = len(rows)
    weights = torch.arange(1, n + 1, dtype=torch.float64)
    return {
        "mean": rows.mean(0),
        "max": rows.amax(0),
        "weighted": (rows * weights[:, None]).sum(0) / weights.sum(),
        "sqrt": rows.sum(0) / math.sqrt(n),
        "first": rows[0],
        "last": rows[-1],
    }[mode]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("width", "lengths"), [(1, [1]), (5, [3]), (384, [1, 7, 256, 2]), (33, [4] * 70), (64, [900])])
def test_equals_each_sequence_alone(mode: str, width: int, lengths: list[int], dtype: torch.dtype) -> None:
    starts = torch.tensor([0, *lengths]).cumsum(0)
    hidden = (torch.randn(int(starts[-1]), width) * 3).to(dtype)
    exact = torch.stack([plainly(hidden[a:b].double(), mode) for a, b in pairwise(starts.tolist())])
    for compute in (pool_cpu, pool_reference):
        result = compute(hidden, starts, mode)
        assert result.dtype == torch.float32
        torch.testing.assert_close(result.double(), exact, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("mode", MODES)
def test_any_number_of_threads_gives_the_same(mode: str) -> None:
    lengths = torch.randint(1, 60, (50,))
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    hidden = torch.randn(int(starts[-1]), 96)
    alone = pool_cpu(hidden, starts, mode)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(pool_cpu(hidden, starts, mode), alone)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("mode", ["mean", "max", "weighted", "sqrt"])
def test_not_a_number_stays_in_its_sequence(mode: str) -> None:
    hidden = torch.randn(9, 40)
    hidden[3, 5] = torch.nan
    result = pool_cpu(hidden, torch.tensor([0, 2, 6, 9]), mode)
    assert result.isnan().nonzero().tolist() == [[1, 5]]


def test_no_sequence() -> None:
    for mode in MODES:
        assert pool_cpu(torch.zeros(0, 8), torch.tensor([0]), mode).shape == (0, 8)


def test_reads_what_is_not_contiguous() -> None:
    hidden = torch.randn(6, 8).t()
    starts = torch.tensor([0, 2, 8])
    torch.testing.assert_close(pool_cpu(hidden, starts, "mean"), pool_cpu(hidden.contiguous(), starts, "mean"))


@pytest.mark.parametrize("compute", [pool_cpu, pool_reference])
def test_refuses_what_does_not_fit(compute: object) -> None:
    assert callable(compute)
    hidden = torch.randn(4, 8)
    with pytest.raises(ValueError, match=r"mode must be one of mean, max, .*not 'median'"):
        compute(hidden, torch.tensor([0, 4]), "median")
    with pytest.raises(ValueError, match="starts must increase from 0 to 4"):
        compute(hidden, torch.tensor([0, 5]), "mean")
    with pytest.raises(ValueError, match="starts must increase"):
        compute(hidden, torch.tensor([0, 2, 2, 4]), "max")
    with pytest.raises(ValueError, match="starts must increase"):
        compute(hidden, torch.tensor([1, 4]), "max")
    with pytest.raises(ValueError, match="starts int64"):
        compute(hidden, torch.tensor([0, 4], dtype=torch.int32), "mean")
