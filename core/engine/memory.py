"""Plans the memory of all models before any of them is loaded: weights, KV pools and activations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .candidates import Candidate
from .device.base import Memory

GPU_SHARE = 0.88  # of a GPU's memory, for weights and pools; SGLang's value for one GPU
CPU_SHARE = 0.4  # of the memory that all weights leave free
CPU_LIMIT = 4 << 30  # bytes; a CPU server rarely uses more, and a larger pool slows its start
MAX_CONTEXTS = 16  # a pool on a CPU holds at most this many sequences of full context length


@dataclass(frozen=True, slots=True)
class MemoryShare:
    """The memory of one model: slots (tokens) of its KV pool, and the context length that fits in them.

    Without a pool (``kv_bytes`` 0), slots only bound the tokens of one pass.
    """

    kv_bytes: int
    slots: int
    context: int


NO_SHARE = MemoryShare(0, 0, 0)
COLUMNS = ("model", "dtype", "weights", "KV pool", "tokens", "context", "full requests", "activations")


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """The memory of all models on one device, in bytes.

    ``limit``: for weights and KV pools together. ``activations``: an estimate of the largest pass of any model.
    ``problem``: why the models don't fit, and what to change; "" if they do. If the weights alone don't fit, each model
    has ``NO_SHARE``.
    """

    candidates: Sequence[Candidate]
    shares: Sequence[MemoryShare]
    device: torch.device
    memory: Memory
    limit: int
    activations: int
    problem: str = ""

    @property
    def weights(self) -> int:
        """Bytes of all models' weights."""
        return sum(one.plan.weight_bytes for one in self.candidates)

    @property
    def pools(self) -> int:
        """Bytes of all KV pools."""
        return sum(share.kv_bytes for share in self.shares)

    def rows(self) -> list[dict[str, Any]]:
        """The plan of each model, as builtin types. ``full_requests``: requests of the model's full context length
        whose keys and values fit into its pool at the same time."""
        return [
            {
                "model": one.name,
                "dtype": str(one.plan.dtype).removeprefix("torch."),
                "weight_bytes": one.plan.weight_bytes,
                "kv_cache_dtype": one.settings.kv_cache_dtype if one.plan.kv_shapes else None,
                "kv_bytes": share.kv_bytes,
                "kv_bytes_per_token": one.plan.kv_bytes_per_token,
                "tokens": share.slots,
                "context": share.context,
                "model_context": one.info.context_length,
                "full_requests": share.slots // one.info.context_length,
                "pass_tokens": pass_tokens(one),
                "activation_bytes": activation_bytes(one),
            }
            for one, share in zip(self.candidates, self.shares, strict=True)
        ]

    def lines(self) -> list[str]:
        """The plan as a table, and its sum."""
        cells = [COLUMNS, *map(_cells, self.rows())]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        table = ["  ".join((line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:]))) for line in cells]
        parts = f"weights {gib(self.weights)} + KV pools {gib(self.pools)} + activations {gib(self.activations)}"
        return [
            f"memory of {self.device}: {gib(self.memory.total)}, {gib(self.memory.available)} available, "
            f"{gib(max(self.limit, 0))} of it for weights and KV pools",
            *table,
            f"{parts} (an estimate) = {gib(self.weights + self.pools + self.activations)}",
        ]


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    """A model's line of the table; "-" for what can't be planned, because weights don't fit."""
    pool = gib(row["kv_bytes"]) if row["kv_bytes"] else "-" if row["kv_bytes_per_token"] else "none"
    context, whole = f"{row['context']:,}", f"{row['model_context']:,}"
    planned = ("-", whole, "-")
    if row["tokens"]:
        context = whole if context == whole else f"{context} of {whole}"
        planned = (f"{row['tokens']:,}", context, f"{row['full_requests']:,}")
    return row["model"], row["dtype"], gib(row["weight_bytes"]), pool, *planned, gib(row["activation_bytes"])


def plan(
    candidates: Sequence[Candidate],
    device: torch.device,
    memory: Memory,
    *,
    fraction: float | None = None,
    pool_bytes: int | None = None,
) -> MemoryPlan:
    """Divide the memory for keys and values evenly among the models that have a KV pool.

    ``fraction``: on a GPU, the share of its whole memory that is used when weights and pools are there, by default
    88%; other processes' use counts. On a CPU, the share of the available memory for weights and pools. ``pool_bytes``:
    the memory of all pools, by default what is left of this share; on a CPU without ``fraction``, 40% of what the
    weights leave, at most 4 GiB. Activations must fit beside weights and pools. If anything doesn't fit, the plan's
    ``problem`` says so.
    """
    on_cpu = device.type == "cpu"
    activations = max(activation_bytes(one) for one in candidates)
    limit = memory.available - activations
    if not on_cpu:
        limit -= sum(map(table_bytes, candidates))
    if not on_cpu:
        limit = min(limit, int(memory.total * (fraction or GPU_SHARE)) - (memory.total - memory.available))
    elif fraction is not None:
        limit = min(limit, int(memory.available * fraction))
    weights = sum(one.plan.weight_bytes for one in candidates)
    loaded = weights + max(loading_bytes(one) for one in candidates)
    if pool_bytes is None:
        pool_bytes = limit - weights
        if on_cpu and fraction is None:
            pool_bytes = min(int((memory.available - weights) * CPU_SHARE), CPU_LIMIT, pool_bytes)
    if loaded >= limit:
        problem = _too_little(candidates, loaded, limit, activations, memory)
        return MemoryPlan(candidates, [NO_SHARE] * len(candidates), device, memory, limit, activations, problem)
    shares, problem = _divide(candidates, pool_bytes, on_cpu=on_cpu)
    pools = sum(share.kv_bytes for share in shares)
    if not problem and weights + pools > limit:
        problem = (
            f"KV pools of {gib(pools)} and weights of {gib(weights)} don't fit in the {gib(limit)} of memory that they "
            "may use. Lower --max-total-tokens or --kv-cache-bytes."
        )
    return MemoryPlan(candidates, shares, device, memory, limit, activations, problem)


def _too_little(candidates: Sequence[Candidate], weights: int, limit: int, activations: int, memory: Memory) -> str:
    """The sentence about weights that don't fit, with the changes that could help."""
    changes = []
    if weights < memory.available - activations:
        changes.append("raise --mem-fraction-static")
    elif weights < memory.available:
        changes.append("lower --chunked-prefill-size")
    elif weights < memory.total - activations:
        changes.append("free memory that other processes use")
    if len(candidates) > 1:
        changes.append("load fewer models")
    if any(one.plan.dtype == torch.float32 for one in candidates):
        changes.append("choose --dtype bfloat16")
    advice = " or ".join(changes) or "choose a smaller model, or a device with more memory"
    return (
        f"The weights need {gib(weights)} but {gib(max(limit, 0))} of memory is free for weights and KV pools: "
        f"{gib(memory.available)} of {gib(memory.total)} is available, and a pass needs {gib(activations)}. "
        f"{advice[0].upper()}{advice[1:]}."
    )


def _divide(candidates: Sequence[Candidate], pool_bytes: int, *, on_cpu: bool) -> tuple[list[MemoryShare], str]:
    """Each model's share of the memory for pools, and "" or why one has no room for a token."""
    users = [one for one in candidates if one.plan.kv_bytes_per_token]
    left = pool_bytes - sum(one.plan.kv_bytes_per_token * (one.settings.max_total_tokens or 0) for one in users)
    share = left // max(1, sum(one.settings.max_total_tokens is None for one in users))
    shares = [_share(one, share, on_cpu=on_cpu) for one in candidates]
    for one, granted in zip(candidates, shares, strict=True):
        if granted.slots < 1:
            return shares, (
                f"No room for the KV cache of {one.name}: a token takes {one.plan.kv_bytes_per_token} bytes "
                f"and {max(share, 0)} are left. Raise --kv-cache-bytes or --mem-fraction-static, lower another model's "
                "--max-total-tokens or load fewer models."
            )
    return shares, ""


def _share(one: Candidate, share: int, *, on_cpu: bool) -> MemoryShare:
    context, token_bytes, asked = one.info.context_length, one.plan.kv_bytes_per_token, one.settings.max_total_tokens
    if not token_bytes:  # an encoder keeps nothing between passes
        most = asked or pass_tokens(one)
        return MemoryShare(0, most, min(context, most))
    slots = asked
    if slots is None:
        slots = share // token_bytes
        if on_cpu:
            slots = min(slots, MAX_CONTEXTS * context)
    return MemoryShare(slots * token_bytes, slots, min(context, slots))


def pass_tokens(one: Candidate) -> int:
    """The tokens of a model's largest pass."""
    context = one.info.context_length
    if one.plan.kv_bytes_per_token:
        return one.pass_tokens or context
    return max(one.pass_tokens or MAX_CONTEXTS * context, context)  # a text is computed in one pass, so it must fit


def activation_bytes(one: Candidate) -> int:
    """An estimate of the memory of a model's largest pass, beside weights and pool: hidden rows, logits, attention."""
    tokens = pass_tokens(one)
    logits = one.plan.bytes_per_logits_row * min(tokens, one.running)
    return one.plan.bytes_per_token * tokens + logits + one.backend.scratch_bytes


def loading_bytes(one: Candidate) -> int:
    """What a model's weights need beside their final size, while they are loaded and not yet stored otherwise."""
    return max(0, one.plan.loading_bytes - one.plan.weight_bytes)


def table_bytes(one: Candidate) -> int:
    """The slot table of a model on a GPU, int32."""
    return one.running * one.info.context_length * 4 if one.plan.kv_bytes_per_token else 0


def gib(count: float) -> str:
    """``count`` bytes as text, in GiB."""
    return f"{count / 2**30:.2f} GiB"
