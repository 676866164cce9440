"""Parity checks of the kernels beside attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from gpu.context import Context
from gpu.item import ROUNDING, Item, largest_error, name_of, unequal
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

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
WIDTHS, TINY_WIDTHS = (4096, 5120, 8192, 2048, 1024, 128, 77), (77,)  # of norms: each has a plan
INNER, TINY_INNER = (14336, 77), (77,)  # of elementwise operations: all widths have the same plan
TOKENS, TINY_TOKENS = (1, 333), (5,)
# Head dim, rotated dim.
ROTARY, TINY_ROTARY = ((128, 128), (64, 64), (80, 32), (96, 96), (256, 64)), ((80, 32),)
VOCABULARIES, TINY_VOCABULARIES = (128256, 151936, 50257), (300,)
EPS = 1e-5
EXACT = 1e-5  # of results that are float32
SAME_TOKENS = 0.01  # share of rows: sums of float32 decide whether a token at the edge of top-p is kept
ADJUSTED = 4 * ROUNDING[torch.float32]  # float64, but products and sums may be fused

Check = Callable[[], float]


def items(context: Context) -> Iterator[Item]:
    """An item for each operation and dtype."""
    dtypes = context.pick(DTYPES, (torch.float32, torch.float16))
    for dtype in dtypes[:1] if context.small else dtypes:
        bound = max(EXACT, 2 * ROUNDING[dtype])
        for operation, checks in _by_dtype(context, dtype):
            yield Item(operation, name_of(dtype), bound, "2 roundings" if bound > EXACT else "float32 sums", checks)
        yield Item("kv_write", name_of(dtype), 0.0, "copies", [partial(_kv_write, context, dtype)])
        yield Item("pool", name_of(dtype), EXACT, "float32 sums", _pool(context, dtype))
    for experts in context.pick((8, 128), (8,)):
        yield Item("expert_counts", f"{experts} experts", 0.0, "counts", [partial(_counts, context, experts)])
    float32 = name_of(torch.float32)
    vocabularies = context.pick(VOCABULARIES, TINY_VOCABULARIES)
    for size in vocabularies[:1] if context.small else vocabularies:
        inputs = f"{float32}, {size} ids"
        yield Item("sample", inputs, SAME_TOKENS, "share of rows", [partial(_sample, context, size)])
        yield Item("logprobs", inputs, EXACT, "float32 sums", [partial(_logprobs, context, size)])
        yield Item("adjust", inputs, ADJUSTED, "4 roundings", [partial(_adjust, context, size)])


def _by_dtype(context: Context, dtype: torch.dtype) -> Iterator[tuple[str, list[Check]]]:
    """Operations whose result has the dtype of their inputs, rounded once."""
    tokens, widths = context.pick(TOKENS, TINY_TOKENS), context.pick(WIDTHS, TINY_WIDTHS)
    shapes = [(count, width) for width in widths[: 2 if context.small else None] for count in tokens]
    for residual in (False, True):
        suffix = " with residual" if residual else ""
        checks: list[Check] = [partial(_norm, context, dtype, shape, residual) for shape in shapes]
        yield f"rms_norm{suffix}", checks
        yield f"layer_norm{suffix}", [partial(_layer_norm, context, dtype, shape, residual) for shape in shapes]
    for normed in (False, True):
        rotary = context.pick(ROTARY, TINY_ROTARY)
        checks = [partial(_rope, context, dtype, widths, normed) for widths in rotary]
        yield "rope and norm of heads" if normed else "rope", checks
        checks = [partial(_rope_and_write, context, dtype, widths, normed) for widths in rotary]
        yield f"rope{', norm of heads' if normed else ''} and kv_write", checks
    shapes = [(count, width) for width in context.pick(INNER, TINY_INNER) for count in tokens]
    for name in activation_reference.ACTIVATIONS:
        yield f"activation {name}", [partial(_activation, context, dtype, shape, name) for shape in shapes]
        yield f"glu {name}", [partial(_glu, context, dtype, shape, name) for shape in shapes]


def _noise(context: Context, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    generator = torch.Generator(context.device).manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, device=context.device).to(dtype)


def _norm(context: Context, dtype: torch.dtype, shape: tuple[int, int], residual: bool) -> float:
    x, weight = _noise(context, dtype, *shape) * 3, _noise(context, torch.float32, shape[1])
    added = _noise(context, dtype, *shape).flip(0) if residual else None
    expected = norm_reference.rms_norm_reference(x.double(), weight, EPS, added)
    return largest_error(norm.rms_norm(x, weight, EPS, added), expected)


def _layer_norm(context: Context, dtype: torch.dtype, shape: tuple[int, int], residual: bool) -> float:
    x = _noise(context, dtype, *shape) * 3 + 2
    weight, bias = _noise(context, torch.float32, 2, shape[1])
    added = _noise(context, dtype, *shape).flip(0) if residual else None
    expected = layer_norm_reference.layer_norm_reference(x.double(), weight, bias, EPS, added)
    return largest_error(layer_norm.layer_norm(x, weight, bias, EPS, added), expected)


def _rope(context: Context, dtype: torch.dtype, widths: tuple[int, int], normed: bool) -> float:
    """5 query heads, 2 key heads, 2 value heads, which must stay."""
    qkv, cos, sin, weights = _heads(context, dtype, widths, normed)
    expected = qkv.double()
    rope_reference.rope_reference(expected, cos.double(), sin.double(), 5, 2, *weights)
    rope.rope(qkv, cos, sin, 5, 2, *weights)
    return largest_error(qkv, expected)


def _rope_and_write(context: Context, dtype: torch.dtype, widths: tuple[int, int], normed: bool) -> float:
    """Value heads and all slots that aren't written must stay; key heads of ``qkv`` aren't compared."""
    qkv, cos, sin, weights = _heads(context, dtype, widths, normed)
    count = 2 * len(qkv)
    slots = torch.randperm(count, generator=torch.Generator().manual_seed(0))[: len(qkv)].to(context.device)
    keys, values = (_noise(context, dtype, count, 2, widths[0]) for _ in range(2))
    expected, exact = qkv.double(), KVSlots(keys.double(), values.double(), slots)
    rope_reference.rope_reference(expected, cos.double(), sin.double(), 5, 2, *weights, exact)
    rope.rope(qkv, cos, sin, 5, 2, *weights, KVSlots(keys, values, slots))
    pairs = ((qkv[:, :5], expected[:, :5]), (qkv[:, 7:], expected[:, 7:]), (keys, exact.keys), (values, exact.values))
    return max(largest_error(*pair) for pair in pairs)


def _heads(
    context: Context, dtype: torch.dtype, widths: tuple[int, int], normed: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, tuple[Any, Any, float]]:
    """Packed heads, cos, sin, and the arguments of norms."""
    width, rotary = widths
    qkv = _noise(context, dtype, context.pick(333, 5), 9, width)
    angle = _noise(context, torch.float32, len(qkv), rotary // 2).repeat(1, 2) * 50
    weights = (*_noise(context, torch.float32, 2, width), EPS) if normed else (None, None, 0.0)
    return qkv, angle.cos().to(dtype), angle.sin().to(dtype), weights


def _activation(context: Context, dtype: torch.dtype, shape: tuple[int, int], name: str) -> float:
    x = _noise(context, dtype, *shape) * 3
    return largest_error(activation.activate(x, name), activation_reference.activate_reference(x.double(), name))


def _glu(context: Context, dtype: torch.dtype, shape: tuple[int, int], name: str) -> float:
    x = _noise(context, dtype, shape[0], 2 * shape[1])
    return largest_error(glu.glu(x, name), glu_reference.glu_reference(x.double(), name))


def _kv_write(context: Context, dtype: torch.dtype) -> float:
    """Values are a view with other strides. Slots that aren't written must stay."""
    tokens, slots = context.pick((777, 2000), (7, 20))
    k, v = _noise(context, dtype, tokens, 8, 128), _noise(context, dtype, 8, tokens, 64).transpose(0, 1)
    written = torch.randperm(slots, generator=torch.Generator().manual_seed(0))[:tokens].to(context.device)
    keys, values = _noise(context, dtype, slots, 8, 128), _noise(context, dtype, slots, 8, 64)
    expected = keys.clone(), values.clone()
    write_reference.write_reference(k, v, *expected, written)
    kv_write.write(k, v, keys, values, written)
    return max(largest_error(keys, expected[0]), largest_error(values, expected[1]))


def _pool(context: Context, dtype: torch.dtype) -> list[Check]:
    lengths = context.pick((1, 512, 7, 33, 130), (1, 7, 3))

    def error(mode: str, width: int) -> float:
        hidden = _noise(context, dtype, sum(lengths), width)
        starts = torch.tensor([0, *lengths], device=context.device).cumsum(0)
        expected = pool_reference.pool_reference(hidden, starts, mode)
        return largest_error(pool.pool(hidden, starts, mode), expected)

    widths = context.pick((4096, 77), (77,))
    return [partial(error, mode, width) for mode in pool_reference.MODES for width in widths]


def _counts(context: Context, experts: int) -> float:
    """With ids outside of the range, which aren't counted."""
    tokens, generator = context.pick(4096, 40), torch.Generator(context.device).manual_seed(experts)
    ids = torch.randint(-1, experts + 1, (tokens, 8), generator=generator, device=context.device)
    expected = counts_reference.expert_counts_reference(ids, experts)
    return unequal(expert_counts.expert_counts(ids, experts), expected)


def _sample(context: Context, size: int) -> float:
    """Rows with all combinations of the options; seeds and positions of 64 bits."""
    rows, device = context.pick(256, 8), context.device
    logits = _noise(context, torch.float32, rows, size) * 3
    logits[:, 1::7] = -torch.inf

    def cycled(values: list[float], dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=device).repeat(rows)[:rows]

    arguments = (
        logits,
        cycled([1.0, 0.0, 0.7, 2.0], torch.float32),
        cycled([-1, -1, -1, 50, 1], torch.int64),
        cycled([1.0, 0.9, 0.5], torch.float32),
        cycled([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.05], torch.float32),
        torch.arange(rows, device=device) * 0x1234567890ABCDE - 2**62,
        torch.arange(rows, device=device) * 977,
    )
    return unequal(sample.sample(*arguments), sample_reference.sample_reference(*arguments))


def _logprobs(context: Context, size: int) -> float:
    """The most likely ids must be the same."""
    rows, device = context.pick(64, 4), context.device
    logits = _noise(context, torch.float32, rows + 3, size) * 3
    chosen = torch.arange(rows, device=device) * 37 % size
    ids = torch.arange(rows * 70, device=device).view(rows, 70) % (size + 5) - 2
    temperature = torch.linspace(0, 2, rows, device=device)
    arguments = (logits, torch.arange(rows, device=device).flip(0), temperature, chosen, 5, ids)
    result, expected = logprobs.logprobs(*arguments), logprobs_reference.logprobs_reference(*arguments)
    if not torch.equal(result.top_ids, expected.top_ids):
        return float("inf")
    parts = ((result.chosen, expected.chosen), (result.top, expected.top), (result.ids, expected.ids))
    return max(largest_error(*part) for part in parts)


def _adjust(context: Context, size: int) -> float:
    """Penalties and biases of 200 ids of each of some rows; half of the ids are in both lists."""
    rows, device, listed = context.pick(64, 4), context.device, context.pick(200, 20)
    logits = _noise(context, torch.float32, rows + 2, size) * 4
    generator = torch.Generator().manual_seed(0)
    order = torch.stack([torch.randperm(size, generator=generator)[: 2 * listed] for _ in range(rows)]).to(device)
    starts = torch.arange(rows + 1, device=device) * listed
    penalties = torch.rand(rows, 3, dtype=torch.float64, device=device) + 0.5
    counts = torch.ones(rows * listed, device=device)
    biases = _noise(context, torch.float32, rows * listed)
    ids, bias_ids = order[:, :listed].reshape(-1), order[:, listed // 2 : listed + listed // 2].reshape(-1)
    arguments = (torch.arange(rows, device=device) + 1, penalties, starts, ids, counts, starts, bias_ids, biases)
    expected = logits.clone()
    adjust_reference.adjust_reference(expected, *arguments)
    adjust.adjust(logits, *arguments)
    return largest_error(logits, expected)
