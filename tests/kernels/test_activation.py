"""Activations against float64."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from trunkline.kernels.activation import ACTIVATIONS, activate_cpu, activate_reference

gelu, gelu_reference = (partial(activate, activation="gelu") for activate in (activate_cpu, activate_reference))


def test_error_is_at_most_what_is_stated() -> None:
    small = torch.logspace(-30, 0, 4000)
    x = torch.cat([torch.linspace(-20, 20, 400_000), small, -small]).view(8, -1)
    assert (gelu(x).double() - gelu_reference(x.double())).abs().max() <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_far_out_it_is_the_number_or_nothing(dtype: torch.dtype) -> None:
    x = torch.tensor([[1e30, -1e30, torch.inf, -torch.inf, 50.0, -50.0, 0.0]], dtype=dtype)
    expected = torch.tensor([[1e30, 0.0, torch.inf, 0.0, 50.0, 0.0, 0.0]], dtype=dtype)
    torch.testing.assert_close(gelu(x), expected, rtol=0, atol=1e-30)


@pytest.mark.parametrize("shape", [(7, 101), (1, 3), (501, 101)])
def test_bfloat16_is_the_nearest_number(shape: tuple[int, int]) -> None:
    x = (torch.randn(shape) * 3).bfloat16()
    assert torch.equal(gelu(x), gelu_reference(x.double()).bfloat16())


def test_not_a_number_stays_where_it_is() -> None:
    x = torch.randn(3, 40)
    x[1, 7] = torch.nan
    assert gelu(x).isnan().nonzero().tolist() == [[1, 7]]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_activation(activation: str, dtype: torch.dtype) -> None:
    x = (torch.randn(5, 33) * 3).to(dtype)
    tanh = 0.5 * x.double() * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x.double() + 0.044715 * x.double() ** 3)))
    exact = {
        "silu": x.double() / (1 + torch.exp(-x.double())),
        "gelu_tanh": tanh,
        "gelu": 0.5 * x.double() * (1 + torch.erf(x.double() / 2**0.5)),
    }[activation]
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for activate in (activate_cpu, activate_reference):
        result = activate(x, activation)
        assert result.dtype == dtype
        torch.testing.assert_close(result.double(), exact, rtol=tolerance, atol=tolerance)


def test_all_threads_together_leave_nothing_out() -> None:
    x = torch.randn(501, 101)
    expected, before = gelu(x), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        torch.testing.assert_close(gelu(x), expected, rtol=1e-6, atol=1e-6)
    finally:
        torch.set_num_threads(before)


def test_refuses_what_it_cannot_read() -> None:
    with pytest.raises(ValueError, match="x must be a contiguous"):
        gelu(torch.zeros(8, 2).t())
