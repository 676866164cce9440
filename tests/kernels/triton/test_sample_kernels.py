"""Whole kernels under the checked interpreter, against float64, in memory whose other slots hold NaN."""

from __future__ import annotations

import pytest
import torch

from .checked import KernelBug, checked, virtual_tensor
from .sample_kernels import gather_attention, row_norm, scatter_rows

STALE = 2**31 - 1  # what entries of the slot table hold that no row uses
ERRORS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def paged(lengths: list[int], heads: int, kv_heads: int, width: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Queries, keys, values, table and lengths; slots in random order."""
    generator = torch.Generator().manual_seed(sum(lengths))
    total = sum(lengths)
    order = torch.randperm(total + 5, generator=generator)[:total].int()
    table = torch.full((len(lengths), max(lengths) + 3), STALE, dtype=torch.int32)
    for row, length in enumerate(lengths):
        table[row, :length] = order[sum(lengths[:row]) :][:length]
    keys, values = (torch.full((total + 5, kv_heads, width), float("nan"), dtype=dtype) for _ in range(2))
    for pool in (keys, values):
        pool[order.long()] = torch.randn(total, kv_heads, width, generator=generator).to(dtype)
    q = torch.randn(len(lengths), heads, width, generator=generator).to(dtype)
    return q, keys, values, table, torch.tensor(lengths, dtype=torch.int32)


def attention_reference(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, table: torch.Tensor, lengths: torch.Tensor, window: int
) -> torch.Tensor:
    """The formula in float64, a row at a time."""
    group = q.shape[1] // keys.shape[1]
    rows = []
    for row, length in enumerate(lengths.tolist()):
        slots = table[row, max(0, length - window) : length].long()
        key, value = (pool[slots].double().repeat_interleave(group, 1).transpose(0, 1) for pool in (keys, values))
        scores = (key @ q[row].double()[..., None])[..., 0] * q.shape[2] ** -0.5
        rows.append((scores.softmax(-1)[:, None] @ value)[:, 0])
    return torch.stack(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(4, 2, 16), (3, 1, 40)])
@pytest.mark.parametrize("window", [2**30, 7])
def test_attention(dtype: torch.dtype, heads: int, kv_heads: int, width: int, window: int) -> None:
    case = paged([1, 16, 33], heads, kv_heads, width, dtype)
    with checked():
        out = gather_attention(*case, window, block_n=16)
    error = (out.double() - attention_reference(*case, window)).abs().max()
    assert error < ERRORS[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 24, 65])
def test_norm(dtype: torch.dtype, width: int) -> None:
    x, weight = torch.randn(3, width).to(dtype), torch.rand(width).to(dtype)
    with checked():
        out = row_norm(x, weight)
    wide = x.double()
    wanted = wide * (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight.double()
    assert (out.double() - wanted).abs().max() < ERRORS[dtype]


def test_scatter() -> None:
    x, pool = torch.randn(3, 24), torch.zeros(8, 24)
    with checked():
        scatter_rows(x, torch.tensor([6, 0, 3], dtype=torch.int32), pool)
        assert torch.equal(pool[[6, 0, 3]], x)
        with pytest.raises(KernelBug, match="race: program"):
            scatter_rows(x, torch.tensor([6, 0, 6], dtype=torch.int32), pool)
        with pytest.raises(KernelBug, match="bounds: store of 4 bytes"):
            scatter_rows(x, torch.tensor([6, 0, 8], dtype=torch.int32), pool)


def test_rows_beyond_two_to_the_31_elements() -> None:
    pool = virtual_tensor((20_000_000, 128), torch.bfloat16)
    x = torch.randn(2, 128).bfloat16()
    with checked():
        scatter_rows(x, torch.tensor([19_999_999, 7], dtype=torch.int32), pool)
    assert torch.equal(pool[[19_999_999, 7]], x)
