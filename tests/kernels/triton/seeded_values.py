"""Kernels that use undefined values, race, or claim what isn't so, when ``BUG`` is set; like seeded_access.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def total(x, out, n, BLOCK: tl.constexpr, BUG: tl.constexpr):
    i = tl.arange(0, BLOCK)
    if BUG:
        value = tl.load(x + i, i < n)
    else:
        value = tl.load(x + i, i < n, 0.0)
    tl.store(out, tl.sum(value.to(tl.float32), 0))


def sum_of_undefined_lanes(bug: bool) -> bool:
    x, out = torch.randn(100), torch.zeros(1)
    total[(1,)](x, out, 100, BLOCK=128, BUG=bug)
    return torch.allclose(out[0], x.sum(), atol=1e-4)


@triton.jit
def weighted(p, v, out, n, BLOCK: tl.constexpr, D: tl.constexpr, BUG: tl.constexpr):
    i, d = tl.arange(0, BLOCK), tl.arange(0, D)
    at = i[:, None] * D + d[None]
    if BUG:
        values = tl.load(v + at, (i < n)[:, None])
    else:
        values = tl.load(v + at, (i < n)[:, None], 0.0)
    weights = tl.load(p + i, i < n, 0.0)
    rows = tl.broadcast_to(weights[None], (16, BLOCK))
    product = tl.dot(rows, values, input_precision="ieee")
    tl.store(out + tl.arange(0, 16)[:, None] * D + d[None], product)


def values_outside_of_the_window(bug: bool) -> bool:
    """Their weight is 0, but 0 × NaN isn't."""
    p, v, out = torch.rand(10), torch.randn(10, 16), torch.zeros(16, 16)
    weighted[(1,)](p, v, out, 10, BLOCK=16, D=16, BUG=bug)
    return torch.allclose(out, (p @ v).expand(16, 16), atol=1e-5)


@triton.jit
def gather(table, x, out, n, BLOCK: tl.constexpr, BUG: tl.constexpr):
    i = tl.arange(0, BLOCK)
    slot = tl.load(table + i, i < n)
    if BUG:
        tl.store(out + i, tl.load(x + slot), i < n)
    else:
        tl.store(out + i, tl.load(x + slot, i < n), i < n)


def address_from_undefined_slots(bug: bool) -> bool:
    table, x, out = torch.arange(9, -1, -1, dtype=torch.int32), torch.randn(10), torch.zeros(10)
    gather[(1,)](table, x, out, 10, BLOCK=16, BUG=bug)
    return torch.equal(out, x.flip(0))


@triton.jit
def branch(x, out, n, BUG: tl.constexpr):
    flag = tl.load(x, n > 0) if BUG else tl.load(x, n > 0, 0)
    if flag > 0:
        tl.store(out, 1.0)


def branch_on_an_undefined_value(bug: bool) -> bool:
    x, out = torch.ones(1, dtype=torch.int32), torch.zeros(1)
    branch[(1,)](x, out, 0, BUG=bug)
    return bool(out[0] == 0)


@triton.jit
def scatter(x, slots, out, BUG: tl.constexpr):
    row = tl.program_id(0)
    slot = tl.load(slots + (row // 2 if BUG else row))
    tl.store(out + slot, tl.load(x + row))


def two_programs_store_one_element(bug: bool) -> bool:
    x, slots, out = torch.randn(4), torch.tensor([2, 0, 3, 1]), torch.zeros(4)
    scatter[(4,)](x, slots, out, BUG=bug)
    return bug or torch.equal(out[slots], x)


@triton.jit
def shift(x, out, BUG: tl.constexpr):
    row = tl.program_id(0)
    if BUG:
        tl.store(out + row + 1, tl.load(out + row) + 1)
    else:
        tl.store(out + row + 1, tl.load(x + row) + 1)


def one_program_reads_what_another_stores(bug: bool) -> bool:
    """Right in the order in which the plain interpreter runs."""
    x, out = torch.arange(8.0), torch.zeros(9)
    shift[(8,)](x, out, BUG=bug)
    return torch.equal(out, torch.arange(9.0))


@triton.jit
def scatter_block(x, slots, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + tl.load(slots + i), tl.load(x + i))


def lanes_store_one_element(bug: bool) -> bool:
    x, out = torch.arange(4.0), torch.zeros(4)
    slots = torch.tensor([3, 1, 0, 3 if bug else 2])
    scatter_block[(1,)](x, slots, out, BLOCK=4)
    return bug or torch.equal(out[slots], x)


@triton.jit
def count(x, out, BUG: tl.constexpr):
    at = tl.load(x + tl.program_id(0))
    if BUG:
        tl.store(out + at, tl.load(out + at) + 1)
    else:
        tl.atomic_add(out + at, 1)


def counting_without_atomics(bug: bool) -> bool:
    x = torch.tensor([0, 1, 1, 2], dtype=torch.int32)
    out = torch.zeros(3, dtype=torch.int32)
    count[(4,)](x, out, BUG=bug)
    return out.tolist() == [1, 2, 1]


@triton.jit
def asserting(x, out, limit):
    value = tl.load(x)
    tl.device_assert(value < limit, "value is below the limit")
    tl.store(out, value)


def failed_assertion(bug: bool) -> bool:
    x, out = torch.ones(1), torch.zeros(1)
    asserting[(1,)](x, out, 1.0 if bug else 2.0)
    return bool(out[0] == 1)


@triton.jit
def aligned_copy(x, out, first, BLOCK: tl.constexpr):
    i = tl.max_contiguous(tl.multiple_of(first + tl.arange(0, BLOCK), 16), 16)
    tl.store(out + tl.arange(0, BLOCK), tl.load(x + i))


def wrong_divisibility(bug: bool) -> bool:
    x, out = torch.randn(64), torch.zeros(32)
    first = 8 if bug else 16
    aligned_copy[(1,)](x, out, first, BLOCK=32)
    return torch.equal(out, x[first : first + 32])


@triton.jit
def contiguous_gather(x, slots, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    slot = tl.max_contiguous(tl.load(slots + i), BLOCK)
    tl.store(out + i, tl.load(x + slot))


def wrong_contiguity(bug: bool) -> bool:
    x, out = torch.randn(8), torch.zeros(4)
    slots = torch.tensor([2, 3, 5, 4] if bug else [2, 3, 4, 5])
    contiguous_gather[(1,)](x, slots, out, BLOCK=4)
    return torch.equal(out, x[slots])
