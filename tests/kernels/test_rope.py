"""Rotary embedding against its reference in float64, and the reference against rotation."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from trunkline.kernels.layout import KVSlots
from trunkline.kernels.rope import rope_cpu, rope_reference

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-2}


def angles(rows: int, width: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    angle = torch.rand(rows, width // 2) * 6
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("rows", "queries", "keys", "width", "turned"), [(1, 9, 3, 64, 64), (5, 3, 1, 20, 12)])
def test_equals_its_reference(
    rows: int, queries: int, keys: int, width: int, turned: int, dtype: torch.dtype, normed: bool
) -> None:
    qkv = torch.randn(rows, queries + 2 * keys, width).to(dtype)
    cos, sin = angles(rows, turned, dtype)
    weights = (torch.randn(width), torch.randn(width)) if normed else (None, None)
    exact, result = qkv.double(), qkv.clone()
    doubled = [None if weight is None else weight.double() for weight in weights]
    rope_reference(exact, cos.double(), sin.double(), queries, keys, *doubled, 1e-5)
    rope_cpu(result, cos, sin, queries, keys, *weights, 1e-5)
    torch.testing.assert_close(result.double(), exact, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert torch.equal(result[:, queries + keys :], qkv[:, queries + keys :])  # values stay


@pytest.mark.parametrize("pool", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("operation", [rope_reference, rope_cpu])
def test_keys_and_values_are_written_to_their_slots(operation: Callable[..., None], pool: torch.dtype) -> None:
    """As they are in ``qkv`` afterwards; all other slots stay."""
    qkv, weights, slots = torch.randn(5, 7, 20), (torch.rand(20), torch.rand(20), 1e-5), torch.tensor([9, 0, 4, 2, 7])
    keys, values = torch.full((10, 2, 20), torch.nan, dtype=pool), torch.full((10, 2, 20), torch.nan, dtype=pool)
    exact, unwritten = qkv.double(), torch.tensor([1, 3, 5, 6, 8])
    cos, sin = angles(5, 12)
    rope_reference(exact, cos.double(), sin.double(), 3, 2, *weights)
    operation(qkv, cos, sin, 3, 2, *weights, KVSlots(keys, values, slots))
    torch.testing.assert_close(qkv.double(), exact, rtol=1e-5, atol=1e-5)
    assert torch.equal(keys[slots], qkv[:, 3:5].to(pool))
    assert torch.equal(values[slots], qkv[:, 5:].to(pool))
    assert keys[unwritten].isnan().all()
    assert values[unwritten].isnan().all()


def test_turns_pairs_as_complex_numbers() -> None:
    qkv = torch.randn(2, 3, 8)
    cos, sin = angles(2, 8)
    pairs = torch.complex(qkv[:, :2, :4], qkv[:, :2, 4:]) * torch.complex(cos, sin)[:, None, :4]
    rope_cpu(qkv, cos, sin, 1, 1)
    torch.testing.assert_close(qkv[:, :2], torch.cat([pairs.real, pairs.imag], dim=-1))


def test_refuses_what_does_not_fit() -> None:
    qkv = torch.randn(2, 3, 8)
    with pytest.raises(ValueError, match="cos and sin must be"):
        rope_cpu(qkv, *angles(3, 8), 1, 1)
    with pytest.raises(ValueError, match="cos and sin must be"):
        rope_cpu(qkv, *angles(2, 8, torch.bfloat16), 1, 1)
    with pytest.raises(ValueError, match="rotary dimension"):
        rope_cpu(qkv, *angles(2, 10), 1, 1)
    with pytest.raises(ValueError, match="or neither"):
        rope_cpu(qkv, *angles(2, 8), 1, 1, torch.ones(8))
    with pytest.raises(ValueError, match="the head's width 8"):
        rope_cpu(qkv, *angles(2, 8), 1, 1, torch.ones(4), torch.ones(4))
    with pytest.raises(ValueError, match="qkv must be a contiguous"):
        rope_cpu(qkv.transpose(0, 1), *angles(3, 8), 1, 1)
