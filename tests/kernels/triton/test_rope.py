"""Rotary embedding in Triton's interpreter, against float64."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from trunkline.kernels.rope import rope_reference
from trunkline.kernels.triton.rope import rope


@pytest.mark.parametrize(("width", "rotary"), [(64, 64), (80, 80), (96, 24), (16, 2)])
@pytest.mark.parametrize("norms", [False, True])
def test_equals_the_reference(width: int, rotary: int, norms: bool) -> None:
    """5 query, 2 key and 2 value heads of 11 tokens; value heads stay, and so does what isn't rotated without norms."""
    qkv, cos, sin = torch.randn(11, 9, width), torch.randn(11, rotary), torch.randn(11, rotary)
    weights = (torch.randn(width), torch.randn(width), 1e-5) if norms else ()
    expected, values = qkv.double(), qkv[:, 7:].clone()
    rope_reference(expected, cos.double(), sin.double(), 5, 2, *weights)
    rope(qkv, cos, sin, 5, 2, *weights)
    torch.testing.assert_close(qkv.double(), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(qkv[:, 7:], values)


def test_one_weight_without_the_other() -> None:
    with pytest.raises(ValueError, match="come together"):
        rope(torch.randn(1, 2, 8), torch.randn(1, 8), torch.randn(1, 8), 1, 1, torch.randn(8))
