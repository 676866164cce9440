"""Every Triton kernel, with every plan that this GPU uses, against the references in float64 on the same inputs."""

from __future__ import annotations

import traceback
from typing import Any

import gpu_parity_attention
import gpu_parity_operations
import torch
from gpu_context import Context

TABLE = "Largest error, |result - reference| / (1 + |reference|)"


def run(context: Context) -> None:
    """Report a row for each item of this process's share. A check that raises ends its item only."""
    number, count = context.shard
    items = [*gpu_parity_attention.items(context), *gpu_parity_operations.items(context)]
    for item in items[number::count]:
        values: dict[str, Any] = {"operation": item.operation, "inputs": item.inputs, "cases": len(item.checks)}
        if context.left < 0:
            context.record({"note": f"Not checked, since no time was left: {item.operation}, {item.inputs}."})
            continue
        try:
            with torch.inference_mode():
                largest = max(check() for check in item.checks)
        except Exception:  # of the compiler, the driver or the kernel
            context.row(TABLE, **values, within_bound=False)
            context.record({"error": f"{item.operation}, {item.inputs}:\n{traceback.format_exc()}"})
            continue
        within = largest <= item.bound
        context.row(TABLE, **values, largest_error=largest, bound=item.bound, of=item.reason, within_bound=within)
        if not within:
            context.record({"error": f"{item.operation}, {item.inputs}: {largest:.2e} is above {item.bound:.2e}"})
