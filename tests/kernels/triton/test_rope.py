"""Rotary embedding in the checked interpreter, against float64."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from trunkline.kernels.rope import rope_reference
from trunkline.kernels.triton.rope import rope

from .tolerances import DTYPES, ONCE


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("width", "rotary"), [(64, 64), (80, 80), (96, 24), (16, 2)])
@pytest.mark.parametrize("norms", [False, True])
def test_equals_the_reference(width: int, rotary: int, norms: bool, dtype: torch.dtype) -> None:
    """5 query, 2 key and 2 value heads of 11 tokens; value heads stay, and so does what isn't rotated without norms."""
    qkv, cos, sin = (torch.randn(shape).to(dtype) for shape in ((11, 9, width), (11, rotary), (11, rotary)))
    weights = (torch.randn(width), torch.randn(width), 1e-5) if norms else ()
    expected, values = qkv.double(), qkv[:, 7:].clone()
    rope_reference(expected, cos.double(), sin.double(), 5, 2, *weights)
    rope(qkv, cos, sin, 5, 2, *weights)
    torch.testing.assert_close(qkv.double(), expected, atol=1e-5, rtol=ONCE[dtype])
    assert torch.equal(qkv[:, 7:], values)


def test_a_view_of_wider_rows() -> None:
    """What lies between the heads of two tokens isn't touched."""
    rows, cos, sin = torch.randn(7, 5, 40), torch.randn(7, 24), torch.randn(7, 24)
    expected = rows.double()
    rope_reference(expected[:, 1:4, 8:], cos.double(), sin.double(), 2, 1)
    rope(rows[:, 1:4, 8:], cos, sin, 2, 1)
    torch.testing.assert_close(rows.double(), expected, atol=1e-5, rtol=1e-5)


def test_one_weight_without_the_other() -> None:
    with pytest.raises(ValueError, match="come together"):
        rope(torch.randn(1, 2, 8), torch.randn(1, 8), torch.randn(1, 8), 1, 1, torch.randn(8))
