"""Gated and plain activations in the checked interpreter, against float64."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from trunkline.kernels.activation import ACTIVATIONS, activate_reference
from trunkline.kernels.glu import glu_reference
from trunkline.kernels.triton.activation import activate
from trunkline.kernels.triton.glu import glu

from .tolerances import DTYPES, assert_rounded_once

SIZES = [(1, 32), (70, 99), (2, 5000)]


def numbers(rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """Of all magnitudes: some beyond the range of exp(). Products of two stay within float16."""
    return (torch.randn(rows, width).clamp(-3, 3) * torch.logspace(-3, 1.8, width)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_glu_equals_the_reference(name: str, size: tuple[int, int], dtype: torch.dtype) -> None:
    gate_up = numbers(size[0], 2 * size[1], dtype)
    expected = glu_reference(gate_up.double(), name)
    assert_rounded_once(glu(gate_up, name), expected)
    out = torch.empty(size, dtype=dtype)
    assert glu(gate_up, name, out) is out
    assert_rounded_once(out, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_activation_equals_the_reference(name: str, size: tuple[int, int], dtype: torch.dtype) -> None:
    x = numbers(*size, dtype)
    assert_rounded_once(activate(x, name), activate_reference(x.double(), name))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_nan_stays(name: str) -> None:
    assert torch.isnan(activate(torch.tensor([[torch.nan, 1.0]]), name)).tolist() == [[True, False]]
