"""bfloat16, fp8 and TF32 under the checked interpreter, against torch; the plain interpreter gets them wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from .checked import checked

# Values between two bfloat16 numbers, exact ties among them, and the special ones.
TIES = torch.tensor([1.00390625, 1.01171875, -1.00390625, 3.0e38, 1e-40, 0.0, float("inf"), float("nan")])
# The interpreter of 3.7.1 doesn't know the types of AMD's gfx942.
FP8 = ["float8_e4m3fn", "float8_e5m2"]
FP8 += ["float8_e4m3fnuz", "float8_e5m2fnuz"] if triton.__version__ != "3.7.1" else []


@triton.jit
def add(x, y, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i) + tl.load(y + i))


@triton.jit
def multiply_add(x, y, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    a, b = tl.load(x + i), tl.load(y + i)
    tl.store(out + i, tl.where(a > b, -a * 0.5, tl.maximum(a, tl.abs(b))))


@triton.jit
def convert(x, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i).to(out.dtype.element_ty))


@triton.jit
def matmul(a, b, out, N: tl.constexpr, PRECISION: tl.constexpr):
    i, j = tl.arange(0, N)[:, None], tl.arange(0, N)[None]
    product = tl.dot(tl.load(a + i * N + j), tl.load(b + i * N + j), input_precision=PRECISION)
    tl.store(out + i * N + j, product)


@triton.jit
def reduce(x, out, N: tl.constexpr):
    """The sum, the largest, where it is, and the last of the running sums."""
    i = tl.arange(0, N)
    value = tl.load(x + i)
    tl.store(out, tl.sum(value).to(tl.float32))
    tl.store(out + 1, tl.max(value).to(tl.float32))
    tl.store(out + 2, tl.argmax(value, 0).to(tl.float32))
    tl.store(out + 3, tl.max(tl.cumsum(tl.abs(value))).to(tl.float32))


def noise(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)


def same(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return torch.equal(found.float().nan_to_num(nan=12345.0), wanted.float().nan_to_num(nan=12345.0))


def sums() -> bool:
    x, y, out = noise(64), noise(1, 64)[0], torch.zeros(64).bfloat16()
    add[(1,)](x, y, out, BLOCK=64)
    return same(out, x + y)


def mixed() -> bool:
    x, y, out = noise(64), noise(1, 64)[0], torch.zeros(64).bfloat16()
    multiply_add[(1,)](x, y, out, BLOCK=64)
    return same(out, torch.where(x > y, -x * 0.5, torch.maximum(x, y.abs())))


def rounding() -> bool:
    out = torch.zeros(8).bfloat16()
    convert[(1,)](TIES, out, BLOCK=8)
    return same(out, TIES.bfloat16())


def product() -> bool:
    a, b, out = noise(16, 16), noise(16, 16).T.contiguous(), torch.zeros(16, 16)
    matmul[(1,)](a, b, out, N=16, PRECISION="tf32")
    return torch.allclose(out.double(), a.double() @ b.double(), atol=1e-5)


@pytest.mark.parametrize("run", [sums, mixed, rounding, product])
def test_bfloat16_is_that_of_torch(run: Any) -> None:
    with checked():
        assert run()
    try:
        plain = run()
    except Exception:  # upstream has no multiplication of a negated bfloat16, for example
        plain = False
    assert not plain, "the plain interpreter is right as well: the checked one no longer needs this"


def test_reductions_of_bfloat16_are_those_of_its_values() -> None:
    x, out = noise(256), torch.zeros(4)
    with checked():
        reduce[(1,)](x, out, N=256)
    wide = x.double()
    wanted = torch.stack([wide.sum(), wide.max(), wide.argmax(), wide.abs().sum()])
    assert torch.allclose(out.double(), wanted, rtol=2**-8, atol=0)  # triton 3.9 rounds sums to bfloat16


@pytest.mark.parametrize("name", FP8)
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16])
def test_fp8_rounds_to_nearest_even_and_saturates(name: str, source: torch.dtype) -> None:
    dtype = getattr(torch, name)
    limit = torch.finfo(dtype).max
    x = torch.cat([noise(1020) * 4, torch.tensor([1.0625, 1e6, -1e6, 0.0])]).to(source)
    out, back = torch.zeros(1024, dtype=dtype), torch.zeros(1024)
    with checked():
        convert[(1,)](x, out, BLOCK=1024)
        convert[(1,)](out, back, BLOCK=1024)
    wanted = x.float().clamp(-limit, limit).to(dtype)
    assert torch.equal(out.view(torch.uint8), wanted.view(torch.uint8))
    assert torch.equal(back, wanted.float())


def test_fp32_products_read_tf32_unless_they_ask_for_more() -> None:
    a, b = noise(16, 16, dtype=torch.float32), noise(16, 16, dtype=torch.float32).T.contiguous()
    wanted = a.double() @ b.double()
    errors = {}
    for precision in ("tf32", "ieee"):
        out = torch.zeros(16, 16)
        with checked():
            matmul[(1,)](a, b, out, N=16, PRECISION=precision)
        errors[precision] = (out.double() - wanted).abs().max().item()
    assert errors["ieee"] < 1e-5
    assert 1e-4 < errors["tf32"] < 1e-2
