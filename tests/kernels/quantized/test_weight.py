"""The codes and scales of quantised weights."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trunkline.kernels.quantized.weight import QuantizedWeight, quantize_int4, quantize_int8


def made(weight: QuantizedWeight | None) -> QuantizedWeight:
    assert weight is not None
    return weight


@given(st.integers(1, 20), st.integers(1, 6), st.floats(-30, 30))
def test_int8_is_within_half_a_step(outputs: int, groups: int, exponent: float) -> None:
    weight = torch.randn(outputs, 32 * groups) * 2.0**exponent
    quantized = made(quantize_int8(weight))
    parts, found = (each.view(outputs, -1, quantized.group) for each in (weight, quantized.numbers()))
    step = parts.abs().amax(2) / 127
    # Scales are rounded to 11 bits, which 127 of them make 3% of a step.
    assert ((found - parts).abs() <= 0.54 * step[..., None] + 1e-4 * step.amax(1)[:, None, None]).all()


@given(st.integers(1, 20), st.integers(1, 6), st.floats(-30, 30), st.booleans())
def test_int4_is_within_half_a_step(outputs: int, groups: int, exponent: float, shifted: bool) -> None:
    weight = (torch.randn(outputs, 32 * groups) + 3 * shifted) * 2.0**exponent
    parts = weight.view(outputs, groups, 32)
    step = (parts.amax(2).clamp_min(0) - parts.amin(2).clamp_max(0)) / 15
    numbers = made(quantize_int4(weight)).numbers().view_as(parts)
    # Scales are rounded to 11 bits: 15 of them add up to 1% of a step.
    assert ((numbers - parts).abs() <= 0.53 * step[..., None] + 1e-4 * step.amax(1)[:, None, None]).all()


def test_what_fits_is_exact() -> None:
    codes = torch.randint(-127, 128, (9, 64))
    codes[:, ::32] = 127
    assert torch.equal(made(quantize_int8(codes * 0.25)).numbers(), codes * 0.25)
    codes = torch.randint(0, 16, (9, 2, 32))
    codes[..., 0], codes[..., 1] = 0, 15
    weight = ((codes - 8) * torch.tensor([0.5, 0.125])[None, :, None]).view(9, 64)
    torch.testing.assert_close(made(quantize_int4(weight)).numbers(), weight, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("quantize", [quantize_int4, quantize_int8])
@pytest.mark.parametrize("number", [0.0, 5.0, -5.0])
def test_a_constant_weight(quantize: object, number: float) -> None:
    weight = torch.full((3, 64), number)
    numbers = made(quantize(weight)).numbers()  # type: ignore[operator]
    torch.testing.assert_close(numbers, weight, rtol=1e-3, atol=0)


@pytest.mark.parametrize(("inputs", "group"), [(576, 64), (512, 32), (608, 32), (32, 32)])
def test_groups(inputs: int, group: int) -> None:
    assert made(quantize_int8(torch.randn(4, inputs))).group == group
    assert made(quantize_int4(torch.randn(4, inputs))).group == 32
    assert made(quantize_int4(torch.randn(4, inputs), group=inputs)).group == inputs


def test_inputs_without_groups_arent_quantised() -> None:
    assert quantize_int8(torch.randn(4, 40)) is None
    assert quantize_int4(torch.randn(4, 40)) is None
