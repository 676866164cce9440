"""RMS norm in the checked interpreter, against float64."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from trunkline.kernels.norm import rms_norm_reference
from trunkline.kernels.triton.norm import rms_norm

from .tolerances import DTYPES, assert_rounded_once


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 64), (70, 77), (5, 3, 48)], ids=str)
@pytest.mark.parametrize("with_residual", [False, True])
def test_equals_the_reference(shape: tuple[int, ...], with_residual: bool, dtype: torch.dtype) -> None:
    x, weight = (torch.randn(shape) * 3).to(dtype), torch.randn(shape[-1])
    residual = torch.randn(shape).to(dtype) if with_residual else None
    expected = rms_norm_reference(x.double(), weight, 1e-5, residual)
    assert_rounded_once(rms_norm(x, weight, 1e-5, residual), expected)


def test_a_weight_in_bfloat16() -> None:
    x, weight = torch.randn(3, 48).bfloat16(), torch.randn(48).bfloat16()
    assert_rounded_once(rms_norm(x, weight, 1e-5), rms_norm_reference(x.double(), weight.double(), 1e-5))


def test_written_over_the_residual() -> None:
    x, weight, residual = torch.randn(9, 33).t().contiguous().t(), torch.randn(33), torch.randn(9, 33)
    expected = rms_norm_reference(x.double(), weight, 1e-5, residual)
    assert rms_norm(x, weight, 1e-5, residual, residual) is residual
    torch.testing.assert_close(residual.double(), expected, atol=1e-5, rtol=1e-5)


def test_written_over_its_argument() -> None:
    x, weight = torch.randn(70, 33), torch.randn(33)
    expected = rms_norm_reference(x.double(), weight, 1e-5)
    assert rms_norm(x, weight, 1e-5, None, x) is x
    torch.testing.assert_close(x.double(), expected, atol=1e-5, rtol=1e-5)


def test_eps_is_added_to_the_mean_square() -> None:
    assert torch.equal(rms_norm(torch.zeros(2, 8), torch.ones(8), 1e-5), torch.zeros(2, 8))
    result = rms_norm(torch.full((1, 8), 1e-3), torch.ones(8), 1e-6)
    torch.testing.assert_close(result, torch.full((1, 8), 0.5**0.5))


def test_out_must_fit() -> None:
    with pytest.raises(ValueError, match="contiguous and of shape"):
        rms_norm(torch.zeros(2, 8), torch.ones(8), 1e-5, None, torch.zeros(2, 16)[:, ::2])
