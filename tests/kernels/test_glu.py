"""Gated activations against float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from trunkline.kernels.activation import ACTIVATIONS
from trunkline.kernels.glu import glu_cpu, glu_reference

TOLERANCE = {torch.float32: 3e-5, torch.bfloat16: 1e-2}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (1, 1536), (5, 33), (40, 500)])
def test_equals_the_formula(rows: int, width: int, dtype: torch.dtype, activation: str) -> None:
    gate_up = (torch.randn(rows, 2 * width) * 4).to(dtype)
    exact = glu_reference(gate_up.double(), activation)
    result = glu_cpu(gate_up, activation)
    assert result.dtype == dtype
    torch.testing.assert_close(result.double(), exact, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_extremes(activation: str) -> None:
    gate = torch.tensor([[-1e4, -200.0, -90.0, -0.0, 0.0, 90.0, 200.0, 1e4]])
    result = glu_cpu(torch.cat([gate, torch.ones_like(gate)], dim=1), activation)
    torch.testing.assert_close(result, gate.clamp_min(0), rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("place", [0, 3])
def test_not_a_number_is_passed_on(activation: str, place: int) -> None:
    gate_up = torch.randn(2, 6)
    gate_up[1, place] = torch.nan
    result = glu_cpu(gate_up, activation)
    assert result[1, 0].isnan()
    assert result.isnan().sum() == 1


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("compute", [glu_cpu, glu_reference])
def test_writes_where_it_is_told(compute: Callable[..., torch.Tensor], activation: str) -> None:
    gate_up, out = torch.randn(3, 12), torch.empty(3, 6)
    assert compute(gate_up, activation, out) is out
    assert torch.equal(out, compute(gate_up, activation))
