"""Launches of groups; :mod:`tests.kernels.test_grouped_linear` compares results."""

from __future__ import annotations

import pytest
import torch

from trunkline.kernels.cpu.launches.groups import Groups
from trunkline.kernels.linear import PackedLinear
from trunkline.kernels.quantized.linear import QuantizedLinear
from trunkline.kernels.quantized.weight import quantize_int4, quantize_int8


def test_groups_of_different_forms() -> None:
    """Their scratch memory has different sizes."""
    layers = [QuantizedLinear(make(torch.randn(64, 96)), torch.float32) for make in (quantize_int8, quantize_int4)]
    x, out = torch.randn(190, 96), torch.empty(190, 64)
    Groups([one.forward_into for one in layers], x, out).run(x, out, torch.tensor([90, 190], dtype=torch.int32))
    assert torch.equal(out, torch.cat([layers[0](x[:90]), layers[1](x[90:])]))


def test_groups_must_have_as_many_launches() -> None:
    weight = torch.randn(64, 96)
    layers = [PackedLinear(weight), QuantizedLinear(quantize_int8(weight), weight.dtype)]
    with pytest.raises(RuntimeError, match="different numbers of launches"):
        Groups([one.forward_into for one in layers], torch.empty(1, 96), torch.empty(1, 64))


def test_launches_that_fail_run_nothing() -> None:
    layer, x, out = PackedLinear(torch.randn(32, 64)), torch.randn(2, 64), torch.zeros(2, 32)

    def fail(*given: torch.Tensor) -> None:
        layer.forward_into(*given)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        Groups([fail], x, out)
    assert not out.any()
    layer.forward_into(x, out)  # launches run at once again
    assert out.any()
