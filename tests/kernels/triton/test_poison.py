"""What a masked load leaves undefined is followed through every kind of operation, and no further."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from .checked import KernelBug, checked


@triton.jit
def load4(x):
    """Eight elements, the last four of them undefined."""
    i = tl.arange(0, 8)
    return tl.load(x + i, i < 4)


@triton.jit
def arithmetic(x, out, N: tl.constexpr):
    i = tl.arange(0, 8)
    value = -tl.exp2(load4(x) * 2.0 + 1.0).to(tl.float16).to(tl.float32)
    tl.store(out + i, tl.fma(value, value, tl.abs(value)), i < N)


@triton.jit
def choice(x, out, N: tl.constexpr):
    i = tl.arange(0, 8)
    tl.store(out + i, tl.where(i < N, load4(x), 0.0))


@triton.jit
def two_dimensions(x, out, N: tl.constexpr):
    i = tl.arange(0, 16)
    rows = tl.trans(tl.broadcast_to(load4(x)[None], (2, 8)))  # [8, 2], the last four rows undefined
    tl.store(out + i, tl.reshape(rows, (16,)), i < 2 * N)


@triton.jit
def transposed(x, out, N: tl.constexpr):
    i = tl.arange(0, 8)
    square = load4(x)[:, None] + tl.zeros((8, 8), tl.float32)  # the last four rows undefined
    tl.store(out + i[:, None] * 8 + i[None], square.T, (i < N)[None] & (i < 8)[:, None])


@triton.jit
def sums(x, out, N: tl.constexpr):
    i = tl.arange(0, 8)
    square = load4(x)[:, None] + tl.zeros((8, 8), tl.float32)
    tl.store(out + i, tl.sum(square, 1), i < N)


@triton.jit
def running(x, out, N: tl.constexpr):
    i = tl.arange(0, 8)
    tl.store(out + i, tl.cumsum(load4(x)), i < N)


@triton.jit
def joined(x, out, N: tl.constexpr):
    i = tl.arange(0, 8)
    first, second = tl.split(tl.join(tl.zeros((8,), tl.float32), load4(x)))
    tl.store(out + i, first)
    tl.store(out + i, second, i < N)


@triton.jit
def product(x, out, N: tl.constexpr):
    i, j = tl.arange(0, 16), tl.arange(0, 16)
    a = tl.load(x + i[:, None] * 16 + j[None], (i < 4)[:, None])  # the last twelve rows undefined
    b = tl.load(x + i[:, None] * 16 + j[None])
    tl.store(out + i[:, None] * 16 + j[None], tl.dot(a, b), (i < N)[:, None] & (j < 16)[None])


@triton.jit
def scalar(x, out, N: tl.constexpr):
    tl.store(out, tl.load(x, N < 5) + 1.0)


@triton.jit
def integers(x, out, N: tl.constexpr):
    i = tl.arange(0, 8)
    bits = (load4(x).to(tl.int32, bitcast=True) >> 3) // 5 % 7
    tl.store(out + i, bits.to(tl.float32), i < N)


@triton.jit
def other_of_a_load(x, out, N: tl.constexpr):
    i = tl.arange(0, 8)
    value = tl.load(x + i, (i < 2) | (i == 7), load4(x))  # 4 to 6 are undefined
    tl.store(out + i, value, (i < N) | (i == 7))


OPERATIONS: list[Any] = [arithmetic, choice, two_dimensions, transposed, sums, running, joined, product, scalar]
OPERATIONS += [integers, other_of_a_load]


@pytest.mark.parametrize("kernel", OPERATIONS, ids=lambda kernel: kernel.__name__)
def test_undefined_elements_are_followed(kernel: Any) -> None:
    x, out = torch.rand(16, 16), torch.zeros(256)
    with checked():
        kernel[(1,)](x, out, N=4)
        with pytest.raises(KernelBug, match=r"^poison: a store writes"):
            kernel[(1,)](x, out, N=5)


@triton.jit
def uses(x, slots, out, HOW: tl.constexpr):
    i = tl.arange(0, 8)
    slot = tl.load(slots + i, i < 4)
    if HOW == "mask":
        tl.store(out + i, 1.0, slot > 0)
    if HOW == "load":
        tl.store(out + i, tl.load(x + slot))
    if HOW == "address":
        tl.store(out + slot, 1.0)
    if HOW == "atomic":
        tl.atomic_add(out.to(tl.pointer_type(tl.int32), bitcast=True) + i, slot)
    if HOW == "bound":
        for _ in tl.range(0, tl.sum(slot, 0)):
            tl.store(out, 1.0)
    if HOW == "gather":
        tl.store(out + i, tl.gather(tl.load(x + i), slot, 0))
    if HOW == "histogram":
        tl.store(out + i, tl.histogram(slot, 8).to(tl.float32))
    if HOW == "assert":
        tl.device_assert(slot < 100)


@pytest.mark.parametrize("how", ["mask", "load", "address", "atomic", "bound", "gather", "histogram", "assert"])
def test_every_use_of_an_undefined_element_is_found(how: str) -> None:
    x, slots, out = torch.rand(8), torch.arange(8, dtype=torch.int32), torch.zeros(8)
    with checked(), pytest.raises(KernelBug, match=r"^poison: "):
        uses[(1,)](x, slots, out, HOW=how)
