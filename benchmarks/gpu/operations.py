"""The time of the kernels beside attention, against the measured copy bandwidth and plain torch on this GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch

from gpu.attention import MICRO, dtype_of, optional
from gpu.context import Context
from trunkline.kernels import activation as activation_reference
from trunkline.kernels import adjust as adjust_reference
from trunkline.kernels import expert_counts as counts_reference
from trunkline.kernels import glu as glu_reference
from trunkline.kernels import kv_write as write_reference
from trunkline.kernels import layer_norm as layer_norm_reference
from trunkline.kernels import logprobs as logprobs_reference
from trunkline.kernels import norm as norm_reference
from trunkline.kernels import pool as pool_reference
from trunkline.kernels import rope as rope_reference
from trunkline.kernels import sample as sample_reference
from trunkline.kernels.layout import KVSlots
from trunkline.kernels.triton import (
    activation,
    adjust,
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

GOAL = 0.85  # of the copy bandwidth
EPS = 1e-5
MANY, FEW = 8192, 64  # tokens of a prefill pass and of a decode pass
ADJUSTED = 2000  # ids per row


class Operation(NamedTuple):
    """``bytes``: that must be read and written at least. ``goal``: of the bandwidth, None where there is none."""

    name: str
    shape: str
    bytes: float
    goal: float | None
    triton: Callable[[], object]
    eager: Callable[[], object]  # the reference, in plain torch


def run(context: Context) -> None:
    """Report a row for each operation and number of tokens."""
    for tokens in context.pick((MANY, FEW), (4,)):
        for build in (_norms, _rotary, _mlp, _writes, _pools, _counts):
            context.attempt(f"{build.__name__[1:]} of {tokens}", measure, build, tokens)
    for rows in context.pick((FEW, 1), (2,)):
        for build in (_sampling, _results):
            context.attempt(f"{build.__name__[1:]} of {rows}", measure, build, rows)


def measure(context: Context, build: Callable[[Context, int], Iterator[Operation]], tokens: int) -> None:
    """Measure a group of operations, which share inputs."""
    for one in build(context, tokens):
        seconds, host = context.stopwatch.seconds(one.triton), context.stopwatch.host_seconds(one.triton)
        share = one.bytes / seconds / context.bandwidth
        goal = one.goal if tokens == MANY else None
        context.row(
            "Other kernels, times in µs",
            operation=one.name,
            shape=one.shape,
            measured=seconds * MICRO,
            host=host * MICRO,
            share_of_bandwidth=share,
            goal=goal,
            reached=None if goal is None else share >= goal,
            torch_eager=_micro(optional(context, one.eager)),
        )


def _micro(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * MICRO


def _noise(context: Context, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype or dtype_of(context), device=context.device)


def _norms(context: Context, tokens: int) -> Iterator[Operation]:
    width = context.pick(4096, 64)
    x, residual = _noise(context, tokens, width), _noise(context, tokens, width)
    weight, bias, out = (_noise(context, width), _noise(context, width), torch.empty_like(x))
    shape = f"{tokens} x {width}"
    yield Operation(
        "rms_norm", shape, 2 * x.nbytes, GOAL,
        lambda: norm.rms_norm(x, weight, EPS, None, out),
        lambda: norm_reference.rms_norm_reference(x, weight, EPS, None, out),
    )  # fmt: skip
    yield Operation(
        "rms_norm with residual", shape, 3 * x.nbytes, GOAL,
        lambda: norm.rms_norm(x, weight, EPS, residual, out),
        lambda: norm_reference.rms_norm_reference(x, weight, EPS, residual, out),
    )  # fmt: skip
    yield Operation(
        "layer_norm with residual", shape, 3 * x.nbytes, GOAL,
        lambda: layer_norm.layer_norm(x, weight, bias, EPS, residual, out),
        lambda: layer_norm_reference.layer_norm_reference(x, weight, bias, EPS, residual, out),
    )  # fmt: skip


def _rotary(context: Context, tokens: int) -> Iterator[Operation]:
    """32 query, 8 key and 8 value heads. The angles are those of all layers, so they come from the L2 cache: only
    queries and keys count."""
    width = context.pick(128, 16)
    qkv = _noise(context, tokens, 48, width)
    angles = _noise(context, tokens, width // 2, dtype=torch.float32).repeat(1, 2)
    cos, sin = angles.cos().to(qkv.dtype), angles.sin().to(qkv.dtype)
    weight = _noise(context, width)
    moved = 2 * qkv[:, :40].numel() * qkv.itemsize
    shape = f"{tokens} x 40 heads of {width}"
    yield Operation(
        "rope", shape, moved + cos.nbytes + sin.nbytes, GOAL,
        lambda: rope.rope(qkv, cos, sin, 32, 8),
        lambda: rope_reference.rope_reference(qkv, cos, sin, 32, 8),
    )  # fmt: skip
    yield Operation(
        "rope and norm of heads", shape, moved + cos.nbytes + sin.nbytes, GOAL,
        lambda: rope.rope(qkv, cos, sin, 32, 8, weight, weight, EPS),
        lambda: rope_reference.rope_reference(qkv, cos, sin, 32, 8, weight, weight, EPS),
    )  # fmt: skip
    slots = torch.randperm(2 * tokens)[:tokens].to(context.device)
    kv_slots = KVSlots(_noise(context, 2 * tokens, 8, width), _noise(context, 2 * tokens, 8, width), slots)
    yield Operation(
        "rope and kv_write", f"{tokens} x 48 heads of {width}",
        2 * qkv.nbytes + cos.nbytes + sin.nbytes + slots.nbytes, GOAL,
        lambda: rope.rope(qkv, cos, sin, 32, 8, kv_slots=kv_slots),
        lambda: rope_reference.rope_reference(qkv, cos, sin, 32, 8, kv_slots=kv_slots),
    )  # fmt: skip


def _mlp(context: Context, tokens: int) -> Iterator[Operation]:
    width = context.pick(14336, 64)
    gate_up = _noise(context, tokens, 2 * width)
    out = gate_up.new_empty(tokens, width)
    yield Operation(
        "glu silu", f"{tokens} x {width}", gate_up.nbytes + out.nbytes, GOAL,
        lambda: glu.glu(gate_up, "silu", out),
        lambda: glu_reference.glu_reference(gate_up, "silu", out),
    )  # fmt: skip
    x = _noise(context, tokens, width)
    yield Operation(
        "activation gelu", f"{tokens} x {width}", 2 * x.nbytes, GOAL,
        lambda: activation.activate(x, "gelu"),
        lambda: activation_reference.activate_reference(x, "gelu"),
    )  # fmt: skip


def _writes(context: Context, tokens: int) -> Iterator[Operation]:
    heads, width = context.pick((8, 128), (2, 16))
    k, v = _noise(context, tokens, heads, width), _noise(context, tokens, heads, width)
    keys, values = _noise(context, 2 * tokens, heads, width), _noise(context, 2 * tokens, heads, width)
    slots = torch.randperm(2 * tokens)[:tokens].to(context.device)
    yield Operation(
        "kv_write", f"{tokens} x {heads} heads of {width}", 2 * (k.nbytes + v.nbytes) + slots.nbytes, None,
        lambda: kv_write.write(k, v, keys, values, slots),
        lambda: write_reference.write_reference(k, v, keys, values, slots),
    )  # fmt: skip


def _pools(context: Context, tokens: int) -> Iterator[Operation]:
    width, each = context.pick(1024, 32), max(1, tokens // 32)
    hidden = _noise(context, tokens, width)
    starts = torch.arange(0, tokens + 1, each, device=context.device)
    yield Operation(
        "pool mean", f"{len(starts) - 1} of {each} x {width}", hidden.nbytes + (len(starts) - 1) * width * 4, None,
        lambda: pool.pool(hidden, starts, "mean"),
        lambda: pool_reference.pool_reference(hidden, starts, "mean"),
    )  # fmt: skip


def _counts(context: Context, tokens: int) -> Iterator[Operation]:
    experts, k = 128, 8
    ids = torch.randint(experts, (tokens, k), device=context.device)
    yield Operation(
        "expert counts", f"{tokens} x {k} of {experts}", ids.nbytes + experts * 4, None,
        lambda: expert_counts.expert_counts(ids, experts),
        lambda: counts_reference.expert_counts_reference(ids, experts),
    )  # fmt: skip


def _sampling(context: Context, tokens: int) -> Iterator[Operation]:
    """Bytes of one pass over the logits: filters read them several times."""
    rows, size, device = tokens, context.pick(128256, 300), context.device
    logits = _noise(context, rows, size, dtype=torch.float32) * 3
    seed, position = torch.arange(rows, device=device), torch.arange(rows, device=device)
    for name, heat, top_k, top_p, min_p in (
        ("greedy", 0.0, -1, 1.0, 0.0),
        ("temperature", 1.0, -1, 1.0, 0.0),
        ("top-k 50, top-p 0.9", 1.0, 50, 0.9, 0.0),
        ("min-p 0.05", 1.0, -1, 1.0, 0.05),
    ):
        values = (heat, top_k, top_p, min_p)
        given = (logits, *(torch.full((rows,), value, device=device) for value in values), seed, position)
        yield Operation(
            f"sample, {name}", f"{rows} x {size}", logits.nbytes, None,
            partial(sample.sample, *given),
            partial(sample_reference.sample_reference, *given),
        )  # fmt: skip


def _results(context: Context, tokens: int) -> Iterator[Operation]:
    rows, size, device, listed = tokens, context.pick(128256, 300), context.device, context.pick(ADJUSTED, 20)
    logits = _noise(context, rows, size, dtype=torch.float32) * 3
    every, heat = torch.arange(rows, device=device), torch.ones(rows, device=device)
    ids = torch.zeros(rows, 0, dtype=torch.int64, device=device)
    for top in (0, 5):
        yield Operation(
            f"logprobs, top {top}", f"{rows} x {size}", logits.nbytes, None,
            partial(logprobs.logprobs, logits, every, heat, every, top, ids),
            partial(logprobs_reference.logprobs_reference, logits, every, heat, every, top, ids),
        )  # fmt: skip
    starts = torch.arange(rows + 1, device=device) * listed
    changed = torch.stack([torch.randperm(size)[:listed] for _ in range(rows)]).reshape(-1).to(device)
    penalties = torch.full((rows, 3), 0.5, dtype=torch.float64, device=device)
    counts = torch.ones(rows * listed, device=device)
    lists = (every, penalties, starts, changed, counts, starts, changed, counts)
    yield Operation(
        "adjust", f"{rows} x {listed} ids", changed.nbytes * 2 + counts.nbytes * 6, None,
        lambda: adjust.adjust(logits, *lists),
        lambda: adjust_reference.adjust_reference(logits, *lists),
    )  # fmt: skip
