"""Serving compiles nothing: launches over one row, over many and with other options are one variant of a kernel."""

from __future__ import annotations

import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from trunkline.kernels.layout import KVSlots, Layout, LayoutTensors
from trunkline.kernels.triton import (
    activation,
    adjust,
    attention_decode,
    attention_extend,
    cost,
    expert_counts,
    glu,
    kv_write,
    layer_norm,
    logprobs,
    norm,
    pool,
    rope,
    sample,
)

from .variants import differences, recorded

ROWS = [1, 2, 7, 16, 17, 48, 300]
HEADS, KV_HEADS, WIDTH, SLOTS = 8, 2, 96, 40


def numbers(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16)


def uploaded(count: int, dtype: torch.dtype) -> torch.Tensor:
    """A part of the host's arrays, which are uploaded as one: its address is divisible by 16 or not."""
    return torch.zeros(count + 1, dtype=dtype)[count % 2 :][:count]


def layout_of(rows: int, tokens: int) -> Layout:
    """``tokens`` new tokens in each row."""
    starts, lengths = np.arange(rows + 1, dtype=np.int32) * tokens, np.full(rows, tokens + 5 * rows, np.int32)
    table, zeros = np.zeros((4, 2000), np.int32), np.zeros(rows, np.int32)
    tensors = LayoutTensors(
        uploaded(rows + 1, torch.int32), uploaded(rows, torch.int32), uploaded(rows, torch.int32),
        torch.from_numpy(table),
    )  # fmt: skip
    return Layout(starts, lengths, zeros, table, uploaded(rows * tokens, torch.int64), 0, tensors)


def options_of(rows: int) -> dict[str, float]:
    """Of attention: a model's layers differ in them. None of them, or some."""
    return {"scale": 0.1 * rows, "window": rows - 1, "chunk": rows // 2}


def decode(rows: int) -> None:
    q, pools = numbers(rows, HEADS, WIDTH), [numbers(SLOTS, KV_HEADS, WIDTH) for _ in range(2)]
    attention_decode.decode(q, *pools, layout_of(rows, 1), np.arange(rows), torch.zeros_like(q), **options_of(rows))


def extend(rows: int) -> None:
    q, k = numbers(3 * rows, HEADS, WIDTH), numbers(3 * rows, KV_HEADS, WIDTH)
    pools = [numbers(SLOTS, KV_HEADS, WIDTH) for _ in range(2)]
    attention_extend.extend(q, k, k, *pools, layout_of(rows, 3), range(rows), torch.zeros_like(q), **options_of(rows))


def encode(rows: int) -> None:
    q, k = numbers(3 * rows, HEADS, WIDTH), numbers(3 * rows, KV_HEADS, WIDTH)
    attention_extend.extend(
        q, k, k, None, None, layout_of(rows, 3), range(rows), torch.zeros_like(q), causal=False, **options_of(rows)
    )


def write(rows: int) -> None:
    k, pools = numbers(rows, KV_HEADS, WIDTH), [numbers(SLOTS, KV_HEADS, WIDTH) for _ in range(2)]
    kv_write.write(k, k, *pools, uploaded(rows, torch.int64))


def rotate(rows: int) -> None:
    qkv, angles, weight = numbers(rows, HEADS + 2 * KV_HEADS, WIDTH), numbers(rows, 32), torch.zeros(WIDTH)
    rope.rope(qkv, angles, angles, HEADS, KV_HEADS, weight, weight, 1e-6)


def rotate_and_write(rows: int) -> None:
    qkv, angles, keys = numbers(rows, HEADS + 2 * KV_HEADS, WIDTH), numbers(rows, 32), numbers(SLOTS, KV_HEADS, WIDTH)
    kv_slots = KVSlots(keys, keys.clone(), uploaded(rows, torch.int64))
    rope.rope(qkv, angles, angles, HEADS, KV_HEADS, eps=1e-6 * rows, kv_slots=kv_slots)


def choose(rows: int) -> None:
    floats, ints = uploaded(rows, torch.float32), uploaded(rows, torch.int64)
    sample.sample(numbers(rows, 1000), floats, ints, floats, floats, ints, ints)


def likelihoods(rows: int) -> None:
    ids, asked = uploaded(rows, torch.int64), uploaded(rows * (rows % 5), torch.int64).view(rows, -1)
    logprobs.logprobs(numbers(rows, 1000), ids, uploaded(rows, torch.float32), ids, rows % 20, asked)


def penalise(rows: int) -> None:
    ids, floats, starts = uploaded(rows, torch.int64), uploaded(rows, torch.float32), uploaded(rows + 1, torch.int64)
    penalties = uploaded(3 * rows, torch.float64).view(rows, 3)
    adjust.adjust(torch.zeros(rows, 1000), ids, penalties, starts, ids, floats, starts, ids, floats)


def mask(rows: int) -> None:
    masks = uploaded(32 * rows, torch.int32).view(rows, 32)
    adjust.mask_tokens(torch.zeros(rows, 1000), uploaded(rows, torch.int64), masks)


VECTOR = torch.zeros(WIDTH)
LAUNCHES: dict[str, Callable[[int], object]] = {
    "decode": decode,
    "extend": extend,
    "encode": encode,
    "write": write,
    "rope": rotate,
    "rope and write": rotate_and_write,
    "rms_norm": lambda rows: norm.rms_norm(numbers(rows, WIDTH), VECTOR, 1e-6 * rows, numbers(rows, WIDTH)),
    "layer_norm": lambda rows: layer_norm.layer_norm(numbers(rows, WIDTH), VECTOR, VECTOR, 1e-6 * rows),
    "glu": lambda rows: glu.glu(numbers(rows, 2 * WIDTH), "silu"),
    "activate": lambda rows: activation.activate(numbers(rows, WIDTH), "gelu"),
    "expert_counts": lambda rows: expert_counts.expert_counts(torch.zeros(rows, 8, dtype=torch.int64), 60),
    "pool": lambda rows: pool.pool(
        numbers(rows, WIDTH), torch.tensor([0, 0, rows])[1:] if rows % 2 else torch.tensor([0, rows]), "mean"
    ),
    "sample": choose,
    "logprobs": likelihoods,
    "adjust": penalise,
    "mask": mask,
}


@pytest.fixture(params=["interpreter", "sm_80", "sm_90", "sm_100", "gfx942"])
def architecture(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The plans of each architecture."""
    name = str(request.param)
    for module in [module for known, module in sys.modules.items() if known.startswith("trunkline.kernels.triton.")]:
        if hasattr(module, "architecture"):
            monkeypatch.setattr(module, "architecture", lambda: name)
    return name


@pytest.mark.usefixtures("architecture")
@pytest.mark.parametrize("name", LAUNCHES)
def test_one_row_and_many_rows_are_one_variant(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "splits", lambda *_: 1)
    with recorded() as variants:
        for rows in ROWS:
            LAUNCHES[name](rows)
    assert len(variants) == (2 if name == "adjust" else 1)
    assert [differences(found) for found in variants.values() if len(found) > 1] == []


@pytest.mark.usefixtures("architecture")
def test_any_number_of_splits_is_one_variant_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "splits", lambda _, __, work, *___: 2 + work.rows % 8)
    with recorded() as variants:
        for rows in ROWS:
            decode(rows)
    assert set(variants) == {"split_kernel", "combine_kernel"}
    assert [differences(found) for found in variants.values() if len(found) > 1] == []


@triton.jit(do_not_specialize=("general",))
def specialised(x: tl.tensor, n: tl.tensor, general: tl.tensor, N: tl.constexpr) -> None: ...


def test_variants_are_told_apart() -> None:
    x = torch.zeros(9)
    with recorded() as variants:
        for n in (1, 3, 5, 16, 32):
            specialised[(1,)](x, n, n, N=4)
        assert len(variants["specialised"]) == 3
        specialised[(1,)](x[1:], 3, 1, N=4)
        specialised[(1,)](x, 3, 1, N=8)
        specialised[(1,)](x, 3, 1, N=4, num_warps=8)
        specialised[(1,)](x, 3, 2**40, N=4)
    assert len(variants["specialised"]) == 7
    assert differences(variants["specialised"]).keys() >= {"x", "n", "general", "N"}
    assert x.count_nonzero() == 0
