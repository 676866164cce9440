"""Parity checks of the attention kernels: all head dims, dtypes and options."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from gpu.cases import Case, Heads
from gpu.context import Context
from gpu.item import ROUNDING, Item, largest_error, name_of

HEADS = (
    Heads(32, 8, 128, 128),
    Heads(8, 2, 64, 64),
    Heads(7, 1, 80, 80),
    Heads(12, 4, 96, 96),
    Heads(4, 2, 256, 256),
    Heads(16, 1, 192, 128),  # keys wider than values
    Heads(36, 1, 64, 64),  # a group that several programs share
)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TINY_HEADS, TINY_DTYPES = HEADS[1:3], (torch.float32, torch.float16)  # the interpreter's bfloat16 is wrong
# A soft cap and sinks are compiled into the kernel; windows and chunks are arguments.
RULES: tuple[dict[str, Any], ...] = (
    {},
    {"window": 33},
    {"chunk": 64},
    {"window": 7, "chunk": 48},
    {"softcap": 5.0, "sinks": True},
    {"softcap": 3.0, "sinks": True, "window": 300},
)
SINGLE_RULES: tuple[dict[str, Any], ...] = ({"softcap": 5.0}, {"sinks": True})  # for one head dim and dtype only
DECODE_LENGTHS = {"one split": (1, 9, 17, 30), "several splits": (1, 129, 1000, 4097)}
EXTEND = ((12, 80, 1500, 41, 7, 130), (12, 3, 700, 30, 1, 130))  # keys of each row; new tokens
# float32: sums of thousands of products. Else: weights are rounded once, and results once.
BOUNDS = {torch.float32: 5e-5} | {dtype: 4 * ROUNDING[dtype] for dtype in (torch.bfloat16, torch.float16)}
REASONS = {torch.float32: "float32 sums"} | dict.fromkeys((torch.bfloat16, torch.float16), "4 roundings")


def items(context: Context) -> Iterator[Item]:
    """The largest plans first: what is likeliest to fail is checked if the time is short."""
    heads, dtypes = context.pick(HEADS, TINY_HEADS), context.pick(DTYPES, TINY_DTYPES)
    if context.small:
        heads, dtypes = heads[:2], dtypes[:1]
    for one in heads:
        for dtype in dtypes:
            extra = SINGLE_RULES if one is heads[0] and dtype is dtypes[0] else ()
            rules = context.pick(RULES[::4] if context.small else (*RULES, *extra), RULES[3:5])
            yield from _decodes(context, one, dtype, rules)
            yield from _extends(context, one, dtype, rules)
    if not context.small:
        yield from _other_pools(context, heads[0])


def _item(operation: str, heads: Heads, dtype: torch.dtype, checks: Sequence[Callable[[], float]]) -> Item:
    inputs = f"{name_of(dtype)}, {heads.queries}/{heads.kv} heads of {heads.width}"
    if heads.value_width != heads.width:
        inputs += f" and {heads.value_width}"
    return Item(operation, inputs, BOUNDS[dtype], REASONS[dtype], checks)


def _decodes(context: Context, heads: Heads, dtype: torch.dtype, rules: Sequence[dict[str, Any]]) -> Iterator[Item]:
    for name, lengths in DECODE_LENGTHS.items():
        lengths = context.pick(lengths, (1, 70))
        build = partial(Case.build, heads, lengths, [1] * len(lengths), dtype, context.device)
        yield _item(f"decode, {name}", heads, dtype, [partial(_decode_error, build, rule) for rule in rules])


def _extends(context: Context, heads: Heads, dtype: torch.dtype, rules: Sequence[dict[str, Any]]) -> Iterator[Item]:
    lengths, new = context.pick(EXTEND, ((12, 70), (12, 3)))
    paged = partial(Case.build, heads, lengths, new, dtype, context.device)
    yield _item("extend, cached prefixes", heads, dtype, [partial(_extend_error, paged, rule) for rule in rules])
    if context.small:
        return
    packed = partial(Case.build, heads, new, new, dtype, context.device)
    kinds = [{"pool": False, "causal": causal} for causal in (True, False)]
    plain = [rule for rule in rules if "softcap" not in rule]
    checks = [partial(_extend_error, packed, rule | kind) for kind in kinds for rule in plain]
    yield _item("extend, packed", heads, dtype, checks)


def _other_pools(context: Context, heads: Heads) -> Iterator[Item]:
    """Queries in float32 over a pool in another dtype: products are rounded to the pool's."""
    pool = context.pick(torch.bfloat16, torch.float16)
    build = partial(Case.build, heads, (5, 90), (1, 1), torch.float32, context.device, pool)
    yield Item(
        "decode, pool of another dtype", f"float32, pool {name_of(pool)}", 4 * ROUNDING[pool], "4 roundings",
        [partial(_decode_error, build, {})],
    )  # fmt: skip


def _rules(case: Case, rules: dict[str, Any]) -> dict[str, Any]:
    """With a score per head for ``sinks``."""
    if not rules.get("sinks"):
        return rules
    return rules | {"sinks": torch.linspace(-1, 2, case.heads.queries, device=case.q.device)}


def _decode_error(build: Callable[[], Case], rules: dict[str, Any]) -> float:
    case = build()
    rules = _rules(case, rules)
    return largest_error(case.decode(case.empty(), **rules), case.decoded(**rules))


def _extend_error(build: Callable[[], Case], rules: dict[str, Any]) -> float:
    case = build()
    rules = _rules(case, rules)
    return largest_error(case.extend(case.empty(), **rules), case.extended(**rules))
