"""The time of the attention kernels, against predictions, the copy bandwidth, and torch's attention on this GPU."""

from __future__ import annotations

from collections.abc import Callable
from itertools import zip_longest
from typing import Any, NamedTuple

import torch

from gpu import predict
from gpu.baselines import Dense
from gpu.cases import Case, Heads
from gpu.context import Context

MICRO = 1e6
LLAMA = Heads(32, 8, 128, 128)
TINY = Heads(4, 2, 16, 16)
# Heads, rows, keys of each. The goal holds for the first.
DECODE = (
    (LLAMA, 64, 4096),
    (LLAMA, 1, 4096),
    (LLAMA, 8, 32768),
    (LLAMA, 256, 1024),
    (LLAMA, 1, 32768),
    (LLAMA, 8, 4096),
    (LLAMA, 8, 1024),
    (LLAMA, 64, 1024),
    (LLAMA, 1, 1024),
    (LLAMA, 256, 4096),
    (Heads(32, 8, 64, 64), 64, 4096),
    (Heads(16, 4, 256, 256), 64, 4096),
    (Heads(32, 32, 96, 96), 64, 4096),
    (Heads(32, 4, 128, 128), 64, 4096),
)
DECODE_GOAL = 0.85  # of the copy bandwidth
# Heads, rows, new tokens of each, cached tokens of each.
EXTEND = (
    (LLAMA, 1, 4096, 0),
    (LLAMA, 8, 512, 0),
    (LLAMA, 8, 512, 3584),
    (LLAMA, 64, 32, 4096),
    (LLAMA, 1, 16384, 0),
    (Heads(32, 8, 64, 64), 1, 4096, 0),
    (Heads(16, 4, 256, 256), 1, 4096, 0),
    (Heads(32, 8, 80, 80), 1, 4096, 0),
)
EXTEND_GOAL = 0.70  # of the speed of torch's flash attention
EAGER_SCORES = 1 << 30  # bytes of scores above which eager attention isn't measured


def run(context: Context) -> None:
    """Report a row for each shape, decode and extend in turn, so that both have their main rows if time is short."""
    decodes = context.pick(DECODE, ((TINY, 2, 16),))
    extends = context.pick(EXTEND, ((TINY, 1, 16, 0), (TINY, 2, 4, 8)))
    for decode, extend in zip_longest(decodes, extends):
        if decode is not None:
            context.attempt(f"decode {decode}", measure_decode, *decode)
        if extend is not None:
            context.attempt(f"extend {extend}", measure_extend, *extend)


def dtype_of(context: Context) -> torch.dtype:
    """The interpreter's bfloat16 is wrong."""
    return context.pick(torch.bfloat16, torch.float32)  # type: ignore[no-any-return]


def optional(context: Context, attention: Callable[[], Any]) -> float | None:
    """The time of torch's kernel; None if it refuses these inputs."""
    try:
        return context.stopwatch.seconds(attention)
    except RuntimeError:
        return None


def optional_flash(context: Context, dense: Dense) -> float | None:
    """The time of torch's flash attention; None if there is none for these inputs. It may repeat KV heads for good."""
    try:
        return context.stopwatch.seconds(dense.flash())
    except RuntimeError:
        return None


class Timed(NamedTuple):
    """Seconds of a Triton launch on the GPU and on the host, and predicted ones."""

    measured: float
    host: float
    predicted: float | None
    splits: int = 1


def time_decode(context: Context, case: Case) -> Timed:
    out = case.empty()
    measured = context.stopwatch.seconds(lambda: case.decode(out))
    splits, predicted = predict.decode(context, case)
    return Timed(measured, context.stopwatch.host_seconds(lambda: case.decode(out)), predicted, splits)


def time_extend(context: Context, case: Case) -> Timed:
    out = case.empty()
    measured = context.stopwatch.seconds(lambda: case.extend(out))
    return Timed(measured, context.stopwatch.host_seconds(lambda: case.extend(out)), predict.extend(context, case))


def measure_decode(context: Context, heads: Heads, rows: int, keys: int) -> None:
    """A row of the table of decode attention. torch's kernels get their inputs when the paged ones are freed."""
    dtype = dtype_of(context)
    timed = time_decode(context, Case.build(heads, [keys] * rows, [1] * rows, dtype, context.device))
    dense = Dense(heads, rows, 1, keys, dtype, context.device)
    share = rows * keys * heads.pair_bytes(dtype) / context.bandwidth / timed.measured
    is_goal = (heads, rows, keys) == DECODE[0]
    context.row(
        "Decode attention: one layer, times in µs",
        heads=f"{heads.queries}/{heads.kv} of {heads.width}",
        rows=rows,
        keys=keys,
        splits=timed.splits,
        **_times(timed),
        share_of_bandwidth=share,
        goal=DECODE_GOAL if is_goal else None,
        reached=share >= DECODE_GOAL if is_goal else None,
        torch_sdpa=_micro(optional(context, dense.sdpa())),
        torch_eager=_micro(optional(context, dense.eager)),
    )


def measure_extend(context: Context, heads: Heads, rows: int, new: int, cached: int) -> None:
    """A row of the table of extend attention. torch's kernels are measured without a cached prefix only."""
    dtype = dtype_of(context)
    timed = time_extend(context, Case.build(heads, [cached + new] * rows, [new] * rows, dtype, context.device))
    flops = 2 * rows * new * (cached + new / 2) * heads.queries * (heads.width + heads.value_width)
    flash = sdpa = eager = None
    if not cached:
        dense = Dense(heads, rows, new, new, dtype, context.device)
        sdpa = optional(context, dense.sdpa())
        if rows * heads.queries * new * new * dtype.itemsize <= EAGER_SCORES:
            eager = optional(context, dense.eager)
        flash = optional_flash(context, dense)
    share = None if flash is None else flash / timed.measured
    is_goal = (heads, rows, new, cached) == EXTEND[0] and share is not None
    context.row(
        "Extend attention, causal: one layer, times in µs",
        heads=f"{heads.queries}/{heads.kv} of {heads.width}",
        rows=rows,
        new_tokens=new,
        cached_tokens=cached,
        **_times(timed),
        TFLOP_per_s=flops / timed.measured / 1e12,
        share_of_flash_speed=share,
        goal=EXTEND_GOAL if is_goal else None,
        reached=share >= EXTEND_GOAL if is_goal and share is not None else None,
        torch_flash=_micro(flash),
        torch_sdpa=_micro(sdpa),
        torch_eager=_micro(eager),
    )


def _times(timed: Timed) -> dict[str, Any]:
    """The columns of a Triton launch."""
    ratio = None if timed.predicted is None else timed.measured / timed.predicted
    return {
        "measured": _micro(timed.measured),
        "predicted": _micro(timed.predicted),
        "measured/predicted": ratio,
        "host": _micro(timed.host),
    }


def _micro(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * MICRO
