"""RMS norm against float64."""

from __future__ import annotations

import pytest
import torch

from trunkline.kernels.norm import rms_norm_cpu, rms_norm_reference

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (1, 576), (3, 33), (70, 500)])
def test_equals_the_formula(rows: int, width: int, dtype: torch.dtype) -> None:
    x = (torch.randn(rows, width) * 3).to(dtype)
    weight = torch.randn(width)
    exact = rms_norm_reference(x.double(), weight.double(), 1e-5)
    for compute in (rms_norm_cpu, rms_norm_reference):
        result = compute(x, weight, 1e-5)
        assert result.dtype == dtype
        torch.testing.assert_close(result.double(), exact, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_adds_a_residual_in_place(dtype: torch.dtype) -> None:
    x, residual, weight = torch.randn(5, 33).to(dtype), torch.randn(5, 33).to(dtype), torch.randn(33)
    exact = rms_norm_reference(x.double(), weight.double(), 1e-5) + residual.double()
    for compute in (rms_norm_cpu, rms_norm_reference):
        out = residual.clone()
        assert compute(x, weight, 1e-5, out, out) is out
        torch.testing.assert_close(out.double(), exact, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    with pytest.raises(ValueError, match="residual must have x's shape"):
        rms_norm_cpu(x, weight, 1e-5, residual[:4])


def test_eps_keeps_zero_rows_finite() -> None:
    assert rms_norm_cpu(torch.zeros(2, 8), torch.ones(8), 1e-6).eq(0).all()


def test_not_a_number_stays_in_its_row() -> None:
    x = torch.randn(3, 40)
    x[1, 7] = torch.nan
    result = rms_norm_cpu(x, torch.ones(40), 1e-6)
    assert result[1].isnan().all()
    assert result[[0, 2]].isfinite().all()


def test_refuses_what_it_cannot_read() -> None:
    with pytest.raises(ValueError, match="width 8, not 9"):
        rms_norm_cpu(torch.zeros(2, 8), torch.ones(9), 1e-6)
    with pytest.raises(ValueError, match="x must be a contiguous"):
        rms_norm_cpu(torch.zeros(8, 2).t(), torch.ones(8), 1e-6)
    with pytest.raises(ValueError, match=r"weight must be a contiguous CPU tensor of torch\.float32"):
        rms_norm_cpu(torch.zeros(2, 8), torch.ones(8, dtype=torch.float64), 1e-6)
