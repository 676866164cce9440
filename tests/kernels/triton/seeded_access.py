"""Kernels with a wrong access each, when ``BUG`` is set: the checked interpreter must find it, the plain one doesn't.

A function runs one of them with or without its bug, and returns whether the numbers are right.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .checked import virtual_tensor


@triton.jit
def double(x, out, n, BLOCK: tl.constexpr, BUG: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i, i < n, 0.0) * 2
    if BUG:
        tl.store(out + i, value)
    else:
        tl.store(out + i, value, i < n)


def store_without_mask(bug: bool) -> bool:
    memory = torch.zeros(512)
    x, out = memory[:100].normal_(), memory[128:228]
    double[(2,)](x, out, 100, BLOCK=64, BUG=bug)
    return torch.equal(out, x * 2)


@triton.jit
def copy_from(x, out, first, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + first + i, i < n, 0.0), i < n)


def _copy(first: int) -> bool:
    memory = torch.randn(64)
    x, out = memory[16:32], torch.zeros(16)
    copy_from[(1,)](x, out, first, 16, BLOCK=16)
    return torch.equal(out, memory[16 + first : 32 + first])


def load_one_after_the_end(bug: bool) -> bool:
    return _copy(1 if bug else 0)


def load_one_before_the_start(bug: bool) -> bool:
    return _copy(-1 if bug else 0)


@triton.jit
def copy_through(x, y, out, distance, BLOCK: tl.constexpr, BUG: tl.constexpr):
    i = tl.arange(0, BLOCK)
    if BUG:
        value = tl.load(x + distance + i)
    else:
        value = tl.load(y + i)
    tl.store(out + i, value)


def load_through_another_tensor(bug: bool) -> bool:
    """The address is inside of ``y``, but computed from ``x``."""
    memory = torch.randn(64)
    x, y, out = memory[:16], memory[32:48], torch.zeros(16)
    copy_through[(1,)](x, y, out, 32, BLOCK=16, BUG=bug)
    return torch.equal(out, y)


@triton.jit
def sum_heads(q, out, stride, HEADS: tl.constexpr, D: tl.constexpr):
    i = tl.arange(0, HEADS)[:, None] * D + tl.arange(0, D)[None]
    row = tl.program_id(0).to(tl.int64)
    tl.store(out + row * D + tl.arange(0, D), tl.sum(tl.load(q + row * stride + i), 0))


def load_between_the_elements_of_a_view(bug: bool) -> bool:
    """Queries are a view of a tensor of queries and keys; the wrong kernel reads the first key, too."""
    qk = torch.randn(3, 4, 8)
    q, out = qk[:, :2], torch.zeros(3, 8)
    sum_heads[(3,)](q, out, qk.stride(0), HEADS=4 if bug else 2, D=8)
    return torch.equal(out, (qk if bug else q).sum(1))


@triton.jit
def first_word(x, out, BUG: tl.constexpr):
    at = x.to(tl.int64, bitcast=True)
    if BUG:
        at += 2
    tl.store(out, tl.load(at.to(tl.pointer_type(tl.float32), bitcast=True)))


def misaligned_load(bug: bool) -> bool:
    x, out = torch.randn(4), torch.zeros(1)
    first_word[(1,)](x, out, BUG=bug)
    return bug or bool(out[0] == x[0])


@triton.jit
def gather_row(pool, slots, out, stride, D: tl.constexpr, BUG: tl.constexpr):
    slot = tl.load(slots + tl.program_id(0))
    if not BUG:
        slot = slot.to(tl.int64)
    i = tl.arange(0, D)
    tl.store(out + tl.program_id(0) * D + i, tl.load(pool + tl.maximum(slot * stride, 0) + i).to(tl.float32))


def int32_offset_into_a_large_pool(bug: bool) -> bool:
    """5 GB of virtual memory; without the check the wrapped offset reads row 0."""
    rows, width = 20_000_000, 128
    pool = virtual_tensor((rows, width), torch.bfloat16)
    pool[rows - 1] = 3
    slots, out = torch.tensor([rows - 1], dtype=torch.int32), torch.zeros(1, width)
    gather_row[(1,)](pool, slots, out, width, D=width, BUG=bug)
    return bool((out == (0 if bug else 3)).all())


@triton.jit
def last_of_loop(x, out, n, BLOCK: tl.constexpr, STRIDE: tl.constexpr, BUG: tl.constexpr):
    for j in tl.range(n - BLOCK, n, BLOCK):
        at = j * STRIDE if BUG else j.to(tl.int64) * STRIDE
        tl.store(out, tl.load(x + at % 4))


def int32_overflow_of_a_loop_variable(bug: bool) -> bool:
    x, out = torch.randn(4), torch.zeros(1)
    last_of_loop[(1,)](x, out, 16 << 20, BLOCK=16, STRIDE=1 << 12, BUG=bug)
    return bool(out[0] == x[0])


@triton.jit
def last_of_python_loop(x, out, n, BLOCK: tl.constexpr, STRIDE: tl.constexpr, BUG: tl.constexpr):
    for j in range(n - BLOCK, n, BLOCK):
        at = j * STRIDE if BUG else (j + tl.zeros((), tl.int64)) * STRIDE
        tl.store(out, tl.load(x + at % 4))


def int32_overflow_of_a_python_loop_variable(bug: bool) -> bool:
    x, out = torch.randn(4), torch.zeros(1)
    last_of_python_loop[(1,)](x, out, 16 << 20, BLOCK=16, STRIDE=1 << 12, BUG=bug)
    return bool(out[0] == x[0])


@triton.jit
def shorten(x, out, BUG: tl.constexpr):
    offset = tl.load(x)
    if BUG:
        offset = offset.to(tl.int32)
    tl.store(out, offset)


def narrowing_of_a_large_offset(bug: bool) -> bool:
    x, out = torch.tensor([1 << 31]), torch.zeros(1, dtype=torch.int64)
    shorten[(1,)](x, out, BUG=bug)
    return bool(out[0] == x[0]) != bug
