"""Gated and plain activations in Triton's interpreter, against float64."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from trunkline.kernels.activation import ACTIVATIONS, activate_reference
from trunkline.kernels.glu import glu_reference
from trunkline.kernels.triton.activation import activate
from trunkline.kernels.triton.glu import glu

SIZES = [(1, 32), (70, 99), (2, 5000)]


def numbers(rows: int, width: int) -> torch.Tensor:
    """Of all magnitudes: some beyond the range of exp()."""
    return torch.randn(rows, width) * torch.logspace(-3, 2.5, width)


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_glu_equals_the_reference(name: str, size: tuple[int, int]) -> None:
    gate_up = numbers(size[0], 2 * size[1])
    expected = glu_reference(gate_up.double(), name)
    torch.testing.assert_close(glu(gate_up, name).double(), expected, atol=1e-5, rtol=1e-5)
    out = torch.empty(size)
    assert glu(gate_up, name, out) is out
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_activation_equals_the_reference(name: str, size: tuple[int, int]) -> None:
    x = numbers(*size)
    torch.testing.assert_close(activate(x, name).double(), activate_reference(x.double(), name), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_nan_stays(name: str) -> None:
    assert torch.isnan(activate(torch.tensor([[torch.nan, 1.0]]), name)).tolist() == [[True, False]]
