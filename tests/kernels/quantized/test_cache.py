"""Keys and values as int8: what is stored, and that the compiled code stores and reads the same."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trunkline.kernels.kv_write import write_cpu, write_reference
from trunkline.kernels.quantized.cache import dequantize, quantize, stored_width


@pytest.mark.parametrize(("width", "size"), [(64, 68), (1, 8), (4, 8), (5, 12), (128, 132)])
def test_stored_width(width: int, size: int) -> None:
    assert stored_width(width) == size
    assert quantize(torch.ones(3, 2, width)).shape == (3, 2, size)


def test_numbers_are_rounded_to_the_nearest() -> None:
    x = torch.tensor([[-12.7, 12.7, 0.05, 0.15, 0.06, -6.34], [0.0] * 6, [1e-31] * 6])
    stored = quantize(x)
    assert stored[0, :6].tolist() == [-127, 127, 0, 2, 1, -63]  # 0.05 and 0.15 are nearly half-way
    assert stored[:, 6:8].tolist() == [[0, 0]] * 3
    assert dequantize(stored, 6)[1:].tolist() == [[0.0] * 6] * 2


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite(wrong: float) -> None:
    """They are seen: NaN, but only in their own head."""
    x = torch.ones(2, 2, 4)
    x[0, 1, 2] = wrong
    pools = [torch.zeros(2, 2, stored_width(4), dtype=torch.int8) for _ in range(2)]
    write_cpu(x, x, *pools, torch.arange(2))
    for stored in (quantize(x), *pools):
        found = dequantize(stored, 4)
        assert found[0, 1].isnan().all()
        assert found.isnan().sum() == 4


@settings(max_examples=100)
@given(
    tokens=st.integers(0, 9),
    heads=st.integers(1, 4),
    widths=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    scale=st.sampled_from([1.0, 1e-20, 1e-35, 1e30]),
    strided=st.booleans(),
    seed=st.integers(0, 99),
)
def test_written_to_the_pool(
    tokens: int,
    heads: int,
    widths: tuple[int, int],
    dtype: torch.dtype,
    scale: float,
    strided: bool,
    seed: int,
) -> None:
    noise = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(heads, tokens, width, generator=noise).mul(scale).to(dtype).transpose(0, 1) for width in widths)
    if not strided:
        k, v = k.contiguous(), v.contiguous()
    slots = torch.randperm(20, generator=noise)[:tokens]
    pools = [[torch.zeros(20, heads, stored_width(width), dtype=torch.int8) for width in widths] for _ in range(2)]
    write_cpu(k, v, *pools[0], slots)
    write_reference(k, v, *pools[1], slots)
    for compiled, reference, x in zip(*pools, (k, v), strict=True):
        assert torch.equal(compiled, reference)
        found, exact = dequantize(compiled[slots], x.shape[2]), x.float()
        step = exact.abs().amax(-1, keepdim=True) / 127
        assert ((found - exact).abs() <= step * 0.5001 + 1e-30).all()
