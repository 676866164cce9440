"""Experts of the deterministic mode: right, and independent of the rows beside a row."""

from __future__ import annotations

import pytest
import torch

from trunkline.kernels.deterministic.linear import ordered_experts
from trunkline.kernels.grouped_linear import grouped_linear_reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_experts(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(3, 48, 24, generator=generator).to(dtype).transpose(1, 2)
    x, ends = torch.randn(30, 48, generator=generator).to(dtype), torch.tensor([11, 11, 30], dtype=torch.int32)
    experts = ordered_experts(weight)
    found = experts(x, ends)
    assert found.dtype == dtype
    torch.testing.assert_close(found, grouped_linear_reference(x, weight, ends), atol=0.05, rtol=0.02)
    alone = experts(x[14:15], torch.tensor([0, 0, 1], dtype=torch.int32))
    assert torch.equal(found[14], alone[0])
