"""Layer norm in the checked interpreter, against float64."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from trunkline.kernels.layer_norm import layer_norm_reference
from trunkline.kernels.triton.layer_norm import layer_norm

from .tolerances import DTYPES, ONCE


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 64), (70, 77)], ids=str)
@pytest.mark.parametrize("with_residual", [False, True])
def test_equals_the_reference(shape: tuple[int, int], with_residual: bool, dtype: torch.dtype) -> None:
    """Numbers far from zero, too: padding must not count in the variance."""
    x, weight, bias = (torch.randn(shape) * 3 + 20).to(dtype), torch.randn(shape[-1]), torch.randn(shape[-1])
    residual = torch.randn(shape).to(dtype) if with_residual else None
    expected = layer_norm_reference(x.double(), weight, bias, 1e-5, residual)
    result = layer_norm(x, weight, bias, 1e-5, residual)
    torch.testing.assert_close(result.double(), expected, atol=2e-5, rtol=2 * ONCE[dtype])


def test_written_over_the_residual() -> None:
    x, weight, bias, residual = torch.randn(9, 33), torch.randn(33), torch.randn(33), torch.randn(9, 33)
    expected = layer_norm_reference(x.double(), weight, bias, 1e-5, residual)
    assert layer_norm(x, weight, bias, 1e-5, residual, residual) is residual
    torch.testing.assert_close(residual.double(), expected, atol=1e-5, rtol=1e-5)
