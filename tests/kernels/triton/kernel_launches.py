"""Launches of all kernels but attention for the compile gate, on tensors of the meta device.

Each is called with the numbers of rows that occur while serving, with all options that don't compile another kernel.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from gate import Expected, Launch
from sample_launches import tensor

from trunkline.kernels.triton.activation import activate
from trunkline.kernels.triton.adjust import adjust, mask_tokens
from trunkline.kernels.triton.expert_counts import expert_counts
from trunkline.kernels.triton.glu import glu
from trunkline.kernels.triton.kv_write import write
from trunkline.kernels.triton.layer_norm import layer_norm
from trunkline.kernels.triton.logprobs import logprobs
from trunkline.kernels.triton.norm import rms_norm
from trunkline.kernels.triton.pool import pool
from trunkline.kernels.triton.rope import rope
from trunkline.kernels.triton.sample import sample

ROWS = (1, 2, 16, 17, 64)
BF16, FP32 = torch.bfloat16, torch.float32
SLOTS = 1 << 18


def vector(count: int, dtype: torch.dtype) -> torch.Tensor:
    """``count`` numbers of an upload: at the start of an allocation, or one number behind it."""
    return tensor(count + 1, dtype=dtype)[count % 2 :][:count]


def write_kv(rows: int, kv_heads: int, width: int, dtype: torch.dtype) -> None:
    packed, slots = tensor(rows, 6 * kv_heads, width, dtype=dtype), vector(rows, torch.int64)
    keys, values = (tensor(SLOTS, kv_heads, width, dtype=dtype) for _ in range(2))
    write(packed[:, 4 * kv_heads : 5 * kv_heads], packed[:, 5 * kv_heads :], keys, values, slots)


def rotate(rows: int, width: int, rotary: int, dtype: torch.dtype, norms: bool) -> None:
    cos, sin, weights = tensor(rows, rotary, dtype=FP32), tensor(rows, rotary, dtype=FP32), [None, None]
    if norms:
        weights = [tensor(width, dtype=dtype), tensor(width, dtype=dtype)]
    rope(tensor(rows, 48, width, dtype=dtype), cos, sin, 32, 8, *weights, 1e-6 * rows)


def normalise(rows: int, width: int, dtype: torch.dtype, residual: bool) -> None:
    x, weight = tensor(rows, width, dtype=dtype), tensor(width, dtype=dtype)
    rms_norm(x, weight, 1e-5, tensor(rows, width, dtype=dtype) if residual else None)


def layer_normalise(rows: int, width: int, dtype: torch.dtype, residual: bool) -> None:
    x, weight, bias = tensor(rows, width, dtype=dtype), tensor(width, dtype=dtype), tensor(width, dtype=dtype)
    layer_norm(x, weight, bias, 1e-5, tensor(rows, width, dtype=dtype) if residual else None)


def draw(rows: int, vocabulary: int, dtype: torch.dtype) -> None:
    floats, integers = [vector(rows, FP32) for _ in range(3)], [vector(rows, torch.int64) for _ in range(3)]
    temperature, top_p, min_p = floats
    top_k, seed, position = integers
    sample(tensor(rows, vocabulary, dtype=dtype), temperature, top_k, top_p, min_p, seed, position)


def penalise(rows: int, vocabulary: int) -> None:
    ids, counts = vector(40, torch.int64), vector(41, torch.int64)[:40]
    starts, bias_starts = vector(rows + 1, torch.int64), vector(rows + 1, torch.int64)
    biases = (bias_starts, vector(7, torch.int64), vector(7, FP32))
    penalties = vector(3 * rows, torch.float64).view(rows, 3)
    adjust(tensor(64, vocabulary, dtype=FP32), vector(rows, torch.int64), penalties, starts, ids, counts, *biases)


def mask(rows: int, vocabulary: int) -> None:
    words = (vocabulary + 31) // 32
    masks = vector(rows * words, torch.int32).view(rows, words)
    mask_tokens(tensor(64, vocabulary, dtype=FP32), vector(rows, torch.int64), masks)


def score(rows: int, vocabulary: int, top: int) -> None:
    ids = vector(rows * top, torch.int64).view(rows, top)
    arguments = (vector(rows, torch.int64), vector(rows, FP32), vector(rows, torch.int64), top, ids)
    logprobs(tensor(64, vocabulary, dtype=FP32), *arguments)


def count(rows: int, experts: int) -> None:
    expert_counts(tensor(rows, 8, dtype=torch.int64), experts)


def reduce(rows: int, width: int, dtype: torch.dtype, mode: str) -> None:
    pool(tensor(5 * rows, width, dtype=dtype), torch.arange(rows + 1) * 5, mode)


def launches(target: str) -> list[Launch]:
    """One per combination of options and widths that compiles another kernel."""
    found: list[Launch] = []

    def add(name: str, kernel: str, call: Callable[[int], object], **expected: bool) -> None:
        calls = tuple(lambda rows=rows: call(rows) for rows in ROWS)
        found.append(Launch(name, calls, {kernel: Expected(**expected)}))

    add("kv write, 8 x 128", "write_kernel", lambda rows: write_kv(rows, 8, 128, BF16))
    add("kv write, 3 x 64", "write_kernel", lambda rows: write_kv(rows, 3, 64, BF16))
    add("kv write, 8 x 80, fp32", "write_kernel", lambda rows: write_kv(rows, 8, 80, FP32))
    add("rope, D=128", "rope_kernel", lambda rows: rotate(rows, 128, 128, BF16, norms=False))
    add("rope, D=128, norms", "rope_kernel", lambda rows: rotate(rows, 128, 128, BF16, norms=True))
    add("rope, 32 of D=80", "rope_kernel", lambda rows: rotate(rows, 80, 32, BF16, norms=False))
    add("rope, 64 of D=256, norms", "rope_kernel", lambda rows: rotate(rows, 256, 64, BF16, norms=True))
    add("rope, D=64, fp32", "rope_kernel", lambda rows: rotate(rows, 64, 64, FP32, norms=False))
    for width, dtype, residual in ((4096, BF16, False), (4096, BF16, True), (576, BF16, True), (16384, BF16, True)):
        name = f"rms norm, {width}{', residual' if residual else ''}"
        add(name, "norm_kernel", lambda rows, a=(width, dtype, residual): normalise(rows, *a))
    add("rms norm, 2048, residual, fp32", "norm_kernel", lambda rows: normalise(rows, 2048, FP32, True))
    add("layer norm, 768, residual", "layer_norm_kernel", lambda rows: layer_normalise(rows, 768, BF16, True))
    add("layer norm, 8192", "layer_norm_kernel", lambda rows: layer_normalise(rows, 8192, BF16, False))
    add("layer norm, 1024, fp32", "layer_norm_kernel", lambda rows: layer_normalise(rows, 1024, FP32, False))
    add("glu, silu, 14336", "glu_kernel", lambda rows: glu(tensor(rows, 28672), "silu"))
    add("glu, gelu_tanh, 1536, fp32", "glu_kernel", lambda rows: glu(tensor(rows, 3072, dtype=FP32), "gelu_tanh"))
    add("activation, gelu, 3072", "activation_kernel", lambda rows: activate(tensor(rows, 3072), "gelu"))
    add("sample, 151936 ids, fp32", "sample_kernel", lambda rows: draw(rows, 151936, FP32))
    add("sample, 49152 ids", "sample_kernel", lambda rows: draw(rows, 49152, BF16))
    narrow = Expected(wide_loads=False)  # they gather single numbers
    adjusts = tuple(lambda rows=rows: penalise(rows, 151936) for rows in ROWS)
    found.append(Launch("adjust", adjusts, {"penalise_kernel": narrow, "bias_kernel": narrow}))
    # A lane's words and stores aren't next to each other.
    add("mask, 151936 ids", "mask_kernel", lambda rows: mask(rows, 151936), wide_loads=False)
    add("logprobs, 151936 ids", "logprobs_kernel", lambda rows: score(rows, 151936, top=rows % 20))
    for experts in (8, 128):
        ids = f"expert counts, {experts}"
        # The mask depends on the number of ids, which isn't a constant.
        add(ids, "count_kernel", lambda rows, n=experts: count(rows, n), wide_loads=False)
    for mode in ("mean", "max", "last"):
        add(f"pool, {mode}", "pool_kernel", lambda rows, mode=mode: reduce(rows, 1024, BF16, mode))
    return found
