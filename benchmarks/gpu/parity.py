"""Every Triton kernel, with every plan that this GPU uses, against the references in float64 on the same inputs."""

from __future__ import annotations

from typing import Any

from gpu import parity_attention, parity_operations
from gpu.context import Context
from gpu.item import Item

TABLE = "Largest error, |result - reference| / (1 + |reference|)"


def run(context: Context) -> None:
    """Report a row for each item of this process's share."""
    number, count = context.shard
    items = [*parity_attention.items(context), *parity_operations.items(context)]
    for item in items[number::count]:
        context.attempt(f"{item.operation}, {item.inputs}", check, item)


def check(context: Context, item: Item) -> None:
    """Report the item's largest error. ArithmeticError if it is above its bound; else what a check raises."""
    values: dict[str, Any] = {"operation": item.operation, "inputs": item.inputs, "cases": len(item.checks)}
    try:
        largest = max(check() for check in item.checks)
    except Exception:
        context.row(TABLE, **values, within_bound=False)
        raise
    within = largest <= item.bound
    context.row(TABLE, **values, largest_error=largest, bound=item.bound, of=item.reason, within_bound=within)
    if not within:
        raise ArithmeticError(f"the error {largest:.2e} is above {item.bound:.2e}")
