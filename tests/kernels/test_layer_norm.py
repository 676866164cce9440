"""Layer norm with a residual against float64."""

from __future__ import annotations

import pytest
import torch

from trunkline.kernels.layer_norm import layer_norm_cpu, layer_norm_reference

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("rows", "width"), [(1, 3), (1, 384), (3, 33), (70, 500)])
def test_equals_the_formula(rows: int, width: int, dtype: torch.dtype, added: bool) -> None:
    x, residual = ((torch.randn(rows, width) * 3 + 1).to(dtype) for _ in range(2))
    weight, bias = torch.randn(width), torch.randn(width)
    total = x.double() + residual.double() if added else x.double()
    apart = total - total.mean(-1, keepdim=True)
    exact = apart / (apart.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double() + bias.double()
    for compute in (layer_norm_cpu, layer_norm_reference):
        result = compute(x, weight, bias, 1e-5, residual if added else None)
        assert result.dtype == dtype
        torch.testing.assert_close(result.double(), exact, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_a_mean_far_from_zero_costs_no_digits() -> None:
    """The squares of what is left after the mean, not of the numbers themselves, are summed."""
    x = torch.randn(4, 256) + 1000
    exact = layer_norm_reference(x.double(), torch.ones(256), torch.zeros(256), 1e-12)
    torch.testing.assert_close(
        layer_norm_cpu(x, torch.ones(256), torch.zeros(256), 1e-12).double(), exact, rtol=0, atol=1e-3
    )


@pytest.mark.parametrize("target", ["x", "residual"])
def test_writes_in_place(target: str) -> None:
    for compute in (layer_norm_cpu, layer_norm_reference):
        x, residual, weight, bias = torch.randn(5, 48), torch.randn(5, 48), torch.randn(48), torch.randn(48)
        expected = compute(x, weight, bias, 1e-6, residual)
        out = x if target == "x" else residual
        assert compute(x, weight, bias, 1e-6, residual, out) is out
        torch.testing.assert_close(out, expected, rtol=0, atol=0)


def test_eps_keeps_constant_rows_finite() -> None:
    assert layer_norm_cpu(torch.full((2, 8), 3.0), torch.ones(8), torch.zeros(8), 1e-12).eq(0).all()


def test_not_a_number_stays_in_its_row() -> None:
    x = torch.randn(3, 40)
    x[1, 7] = torch.nan
    result = layer_norm_cpu(x, torch.ones(40), torch.zeros(40), 1e-6)
    assert result[1].isnan().all()
    assert result[[0, 2]].isfinite().all()


def test_refuses_what_it_cannot_read() -> None:
    x, one = torch.zeros(2, 8), torch.ones(8)
    with pytest.raises(ValueError, match="width 8, not 9 and 8"):
        layer_norm_cpu(x, torch.ones(9), one, 1e-6)
    with pytest.raises(ValueError, match="x must be a contiguous"):
        layer_norm_cpu(torch.zeros(8, 2).t(), one, one, 1e-6)
    with pytest.raises(ValueError, match=r"residual must have x's shape \(2, 8\), not \(3, 8\)"):
        layer_norm_cpu(x, one, one, 1e-6, torch.zeros(3, 8))
    with pytest.raises(ValueError, match=r"residual must be a contiguous CPU tensor of torch\.float32"):
        layer_norm_cpu(x, one, one, 1e-6, torch.zeros(2, 8, dtype=torch.bfloat16))
