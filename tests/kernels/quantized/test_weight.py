"""The codes and scales of quantised weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trunkline.kernels.quantized.weight import QuantizedWeight, grouped, quantize_int4, quantize_int8, stacked


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


@given(st.integers(1, 20), st.integers(1, 9), st.floats(-30, 30), st.booleans())
def test_int4_is_within_half_a_step_in_the_mean(outputs: int, groups: int, exponent: float, shifted: bool) -> None:
    weight = (torch.randn(outputs, 32 * groups) + 3 * shifted) * 2.0**exponent
    quantized = made(quantize_int4(weight))
    parts = weight.view(outputs, groups, 32)
    step = (parts.amax(2) - parts.amin(2)) / 15
    # Multipliers are rounded up, and offsets rounded, to integers: 1/127 of the largest number of a group.
    unit = weight.view(outputs, -1, quantized.group).abs().amax(2).repeat_interleave(quantized.group // 32, 1) / 127
    error = (quantized.numbers().view_as(parts) - parts).square().mean(2).sqrt()
    assert (error <= 0.5 * step + 1.01 * unit).all()


def test_what_fits_is_exact() -> None:
    codes = torch.randint(-127, 128, (9, 64))
    codes[:, ::32] = 127
    assert torch.equal(made(quantize_int8(codes * 0.25)).numbers(), codes * 0.25)
    codes = torch.randint(0, 16, (9, 2, 32))
    codes[..., 0], codes[..., 1] = 0, 15
    multipliers, offsets = torch.tensor([16, 4])[:, None], torch.tensor([1, 100])[:, None]
    weight = 0.25 * (codes * multipliers + offsets - 128).view(9, 64)
    assert torch.equal(made(quantize_int4(weight)).numbers(), weight)


@pytest.mark.parametrize("quantize", [quantize_int4, quantize_int8])
@pytest.mark.parametrize("number", [0.0, 5.0, -5.0])
def test_a_constant_weight(quantize: object, number: float) -> None:
    weight = torch.full((3, 64), number)
    numbers = made(quantize(weight)).numbers()  # type: ignore[operator]
    torch.testing.assert_close(numbers, weight, rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("inputs", "int8", "int4"), [(576, 64, 192), (512, 32, 256), (608, 32, 32), (32, 32, 32), (2048, 64, 256)]
)
def test_groups(inputs: int, int8: int, int4: int) -> None:
    assert made(quantize_int8(torch.randn(4, inputs))).group == int8
    assert made(quantize_int4(torch.randn(4, inputs))).group == int4


def test_inputs_without_groups_arent_quantised() -> None:
    assert quantize_int8(torch.randn(4, 40)) is None
    assert quantize_int4(torch.randn(4, 40)) is None


def test_weights_of_different_kinds_can_be_stacked() -> None:
    """Every format can be written with 8 bits, small groups and minima; zeros that are powers of two lose nothing."""
    int8, int4 = made(quantize_int8(torch.randn(5, 1024))), made(quantize_int4(torch.randn(7, 1024)))
    sixths = QuantizedWeight(
        8, 16, torch.randint(0, 64, (3, 1024), dtype=torch.uint8), torch.rand(3), torch.rand(3, 64).half(), zero=32
    )
    fourths = QuantizedWeight(
        4, 64, torch.randint(0, 16, (6, 1024), dtype=torch.uint8), torch.rand(6), torch.rand(6, 16).half(), zero=8
    )
    for parts in ([int8, int8], [int4, int4], [int8, int4], [int4, fourths], [fourths, int4], [int4, sixths, int8]):
        whole = stacked(parts)
        assert torch.equal(whole.numbers(), torch.cat([part.numbers() for part in parts]))
        assert int(whole.codes.max()) < 2**whole.bits
    assert (whole.bits, whole.group, whole.zero) == (8, 16, 0)


def test_weights_with_different_orders_cant_be_stacked() -> None:
    weight = made(quantize_int8(torch.randn(5, 64)))
    sorted_inputs = replace(weight, order=torch.randperm(64).int())
    assert torch.equal(
        stacked([sorted_inputs, sorted_inputs]).numbers(), torch.cat([sorted_inputs.numbers(), sorted_inputs.numbers()])
    )
    for other in (weight, replace(weight, order=torch.arange(64).int())):
        with pytest.raises(ValueError, match="different orders"):
            stacked([sorted_inputs, other])


@given(
    st.integers(1, 9), st.sampled_from([32, 64, 96, 128]), st.integers(1, 5), st.booleans(), st.booleans(), st.data()
)
def test_grouped(outputs: int, size: int, count: int, constant: bool, shuffled: bool, data: st.DataObject) -> None:
    bits = data.draw(st.sampled_from([4, 8]))
    groups = torch.arange(size * count) // size
    if shuffled:
        groups = groups[torch.randperm(len(groups))]
    codes = torch.randint(0, 1 << bits, (outputs, len(groups)), dtype=torch.uint8)
    scales = (torch.rand(outputs, count) + 0.01).to(data.draw(st.sampled_from([torch.float16, torch.bfloat16]))).float()
    zeros = torch.full((outputs, count), 1 << bits - 1) if constant else torch.randint(0, 1 << bits, (outputs, count))
    weight = grouped(bits, codes, scales, zeros.float(), groups)
    expected = scales[:, groups] * (codes - zeros.float()[:, groups])
    # Minima are products, which are rounded to 11 bits.
    atol = 0 if constant else float(scales.max()) * (1 << bits) * 2**-11
    torch.testing.assert_close(weight.numbers(), expected, rtol=0, atol=atol)
    assert weight.group == (size if bits == 4 else 64 if len(groups) > 512 and size % 64 == 0 else 32)


@pytest.mark.parametrize("groups", [torch.arange(48) // 16, torch.arange(96) // 64, torch.ones(64).long()])
def test_groups_that_arent_multiples_of_32(groups: torch.Tensor) -> None:
    count = int(groups.max()) + 1
    with pytest.raises(ValueError, match="not one multiple of 32"):
        grouped(4, torch.zeros(2, len(groups), dtype=torch.uint8), torch.ones(2, count), torch.zeros(2, count), groups)
