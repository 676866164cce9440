"""Pooling in the checked interpreter, against float64."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from trunkline.kernels.pool import MODES, pool_reference
from trunkline.kernels.triton import plans
from trunkline.kernels.triton.pool import pool

from .tolerances import DTYPES


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("width", [32, 77])
def test_equals_the_reference(mode: str, width: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences of one row, of a tile and of several; blocks of columns with a remainder."""
    monkeypatch.setattr(plans, "pooled", lambda *_: plans.Plan(16, 32))
    starts = torch.tensor([0, 1, 17, 60, 62])
    hidden = (torch.randn(62, width) - 3).to(dtype)
    expected = pool_reference(hidden.double(), starts, mode)
    assert expected.dtype == pool(hidden, starts, mode).dtype == torch.float32
    torch.testing.assert_close(pool(hidden, starts, mode), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_nan_stays_in_its_sequence(mode: str) -> None:
    hidden, starts = torch.randn(9, 8), torch.tensor([0, 4, 5, 9])
    hidden[4, 3] = torch.nan
    result = torch.isnan(pool(hidden, starts, mode))
    assert result[1].tolist() == [at == 3 for at in range(8)]
    assert not result[[0, 2]].any()


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="mode must be one of"):
        pool(torch.zeros(1, 4), torch.tensor([0, 1]), "median")
