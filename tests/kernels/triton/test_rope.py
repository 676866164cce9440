"""Rotary embedding in the checked interpreter, against float64."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from trunkline.kernels.layout import KVSlots
from trunkline.kernels.rope import rope_reference
from trunkline.kernels.triton import rope as module
from trunkline.kernels.triton.kv_write import write
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


SLOTS = 40


def empty_pool(heads: int, width: int, tokens: int, dtype: torch.dtype) -> KVSlots:
    """Scattered slots for the tokens, one of them the last of the pool; all slots are NaN."""
    keys, values = (torch.full((SLOTS, heads, width), torch.nan, dtype=dtype) for _ in range(2))
    others = torch.randperm(SLOTS - 1, generator=torch.Generator().manual_seed(tokens))[: tokens - 1]
    return KVSlots(keys, values, torch.cat([torch.tensor([SLOTS - 1]), others]))


def copy_of(pool: KVSlots, dtype: torch.dtype) -> KVSlots:
    return pool._replace(keys=pool.keys.to(dtype, copy=True), values=pool.values.to(dtype, copy=True))


@pytest.fixture(params=["interpreter", "sm_90"])
def plans(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few programs, and those of a GPU, whose blocks begin within a token."""
    monkeypatch.setattr(module, "architecture", lambda: request.param)


@pytest.mark.usefixtures("plans")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("width", "rotary"), [(64, 64), (80, 80), (96, 96), (96, 24), (16, 2)])
@pytest.mark.parametrize("norms", [False, True])
def test_keys_and_values_are_written_to_their_slots(width: int, rotary: int, norms: bool, dtype: torch.dtype) -> None:
    """5 query, 2 key and 2 value heads of 11 tokens. Slots of no token stay NaN; value heads of ``qkv`` stay."""
    qkv, cos, sin = (torch.randn(shape).to(dtype) for shape in ((11, 9, width), (11, rotary), (11, rotary)))
    weights = (torch.randn(width), torch.randn(width), 1e-5) if norms else (None, None, 0.0)
    expected, values, pool = qkv.double(), qkv[:, 7:].clone(), empty_pool(2, width, 11, dtype)
    exact = copy_of(pool, torch.float64)
    rope_reference(expected, cos.double(), sin.double(), 5, 2, *weights, exact)
    rope(qkv, cos, sin, 5, 2, *weights, pool)
    torch.testing.assert_close(qkv[:, :5].double(), expected[:, :5], atol=1e-5, rtol=ONCE[dtype])
    assert torch.equal(qkv[:, 7:], values)
    torch.testing.assert_close(pool.keys.double(), exact.keys, atol=1e-5, rtol=ONCE[dtype], equal_nan=True)
    torch.testing.assert_close(pool.values.double(), exact.values, atol=0, rtol=0, equal_nan=True)


@pytest.mark.usefixtures("plans")
@pytest.mark.parametrize("dtypes", [(DTYPES[1], DTYPES[0]), (DTYPES[0], DTYPES[2]), (DTYPES[1], DTYPES[1])], ids=str)
@pytest.mark.parametrize("tokens", [1, 33])
def test_the_same_bits_as_with_a_launch_of_its_own(tokens: int, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """For views of wider rows, and with a pool of another dtype."""
    own, dtype = dtypes
    rows, cos, sin = torch.randn(tokens, 9, 104).to(own), torch.randn(tokens, 24), torch.randn(tokens, 24)
    pool, single, qkv = empty_pool(2, 96, tokens, dtype), rows.clone(), rows[:, 1:8, 8:]
    expected = copy_of(pool, dtype)
    rope(single[:, 1:8, 8:], cos, sin, 3, 2)
    write(single[:, 4:6, 8:], single[:, 6:8, 8:], *expected)
    rope(qkv, cos, sin, 3, 2, kv_slots=pool)
    single[:, 4:6, 8:] = rows[:, 4:6, 8:]  # keys, which only the pool has
    assert torch.equal(rows, single)
    torch.testing.assert_close(pool.keys, expected.keys, atol=0, rtol=0, equal_nan=True)
    torch.testing.assert_close(pool.values, expected.values, atol=0, rtol=0, equal_nan=True)


def test_many_tokens() -> None:
    """More heads than a program of the interpreter has, of keys and of values."""
    qkv, cos, sin = torch.randn(150, 12, 8), torch.randn(150, 8), torch.randn(150, 8)
    pool, expected = KVSlots(torch.zeros(150, 4, 8), torch.zeros(150, 4, 8), torch.randperm(150)), qkv.double()
    exact = copy_of(pool, torch.float64)
    rope_reference(expected, cos.double(), sin.double(), 4, 4, kv_slots=exact)
    rope(qkv, cos, sin, 4, 4, kv_slots=pool)
    torch.testing.assert_close(qkv[:, :4].double(), expected[:, :4], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(pool.keys.double(), exact.keys, atol=1e-5, rtol=1e-5)
    assert torch.equal(pool.values.double(), exact.values)


def test_tokens_that_pad_a_graph_have_the_same_slot() -> None:
    """And the same numbers, here: the checks of the interpreter find stores of several numbers to one address."""
    qkv, cos, sin = torch.randn(3, 5, 16), torch.randn(3, 16), torch.randn(3, 16)
    padded = [torch.cat([x, x[:1].expand(6, *x.shape[1:])]).contiguous() for x in (qkv, cos, sin)]
    pool = empty_pool(1, 16, 3, torch.float32)
    alone, slots = copy_of(pool, torch.float32), torch.cat([pool.out_slots, pool.out_slots[:1].expand(6)])
    rope(qkv, cos, sin, 3, 1, kv_slots=alone)
    rope(*padded, 3, 1, kv_slots=pool._replace(out_slots=slots))
    torch.testing.assert_close(pool.keys, alone.keys, atol=0, rtol=0, equal_nan=True)
    torch.testing.assert_close(pool.values, alone.values, atol=0, rtol=0, equal_nan=True)


def test_values_that_are_infinite_or_nan_stay_within_their_place() -> None:
    qkv = torch.randn(2, 3, 8)
    qkv[0, 2, 1], qkv[1, 2, 5] = torch.inf, torch.nan
    pool, angles = empty_pool(1, 8, 2, torch.float32), torch.randn(2, 8)
    rope(qkv, angles, angles, 1, 1, torch.ones(8), torch.ones(8), 1e-5, pool)
    torch.testing.assert_close(pool.values[pool.out_slots, 0], qkv[:, 2], atol=0, rtol=0, equal_nan=True)
