"""Plans the size of all models' KV pools before any of them is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trunkline.core.errors import ModelError

CPU_SHARE = 0.4  # of the memory that all weights leave free
CPU_LIMIT = 4 << 30  # bytes; a CPU server rarely uses more, and a larger pool slows its start
MAX_CONTEXTS = 16  # a pool holds at most this many sequences of full context length


@dataclass(frozen=True, slots=True)
class Demand:
    """One model's memory demand: bytes of weights, bytes of keys and values per token, context in tokens.

    ``tokens`` is the user's ``--max-total-tokens``; None = as many as fit. A model with ``token_bytes`` 0
    (encoders) keeps nothing between passes, and computes up to about ``pass_tokens`` tokens in one pass.
    """

    name: str
    weight_bytes: int
    token_bytes: int
    context: int
    tokens: int | None = None
    pass_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Grant:
    """The memory of one model: slots (tokens) of its KV pool, and the context length that fits in them.

    Without a pool (``kv_bytes`` 0), slots only bound the tokens of one pass.
    """

    name: str
    weight_bytes: int
    kv_bytes: int
    slots: int
    context: int


def plan(demands: Sequence[Demand], *, available: int, budget: int | None = None) -> list[Grant]:
    """Divide the memory for keys and values evenly among the models that have a KV pool.

    ``available``: bytes that this process may use. ``budget``: the user's bound for all pools, in bytes;
    None = 40% of what the weights leave, at most 4 GiB. ModelError, with the numbers, when the weights
    don't fit, when a pool has no room for a token, or when pools and weights exceed ``available``.
    """
    weights = sum(demand.weight_bytes for demand in demands)
    if weights >= available:
        raise ModelError(
            f"The weights need {gib(weights)} but {gib(available)} of memory is free. "
            "Load fewer models or a smaller dtype."
        )
    if budget is None:
        budget = min(int((available - weights) * CPU_SHARE), CPU_LIMIT)
    users = [demand for demand in demands if demand.token_bytes]
    left = budget - sum(demand.token_bytes * (demand.tokens or 0) for demand in users)
    sharers = sum(demand.tokens is None for demand in users)
    grants = [_grant(demand, left // max(sharers, 1)) for demand in demands]
    pools = sum(grant.kv_bytes for grant in grants)
    if weights + pools > available:
        raise ModelError(
            f"KV pools of {gib(pools)} and weights of {gib(weights)} don't fit in the {gib(available)} of memory that "
            "is free. Lower --max-total-tokens or --kv-cache-bytes."
        )
    return grants


def _grant(demand: Demand, share: int) -> Grant:
    if not demand.token_bytes:
        most = demand.tokens or max(
            demand.pass_tokens, demand.context
        )  # a text is computed in one pass, so it must fit
        return Grant(demand.name, demand.weight_bytes, 0, most, min(demand.context, most))
    slots = demand.tokens
    if slots is None:
        slots = min(share // demand.token_bytes, MAX_CONTEXTS * demand.context)
    if slots < 1:
        raise ModelError(
            f"No room for the KV cache of {demand.name}: a token takes {demand.token_bytes} bytes "
            f"and {max(share, 0)} are left. Raise --kv-cache-bytes, lower another model's --max-total-tokens "
            "or load fewer models."
        )
    context = min(demand.context, slots)
    return Grant(demand.name, demand.weight_bytes, slots * demand.token_bytes, slots, context)


def gib(count: float) -> str:
    """``count`` bytes as text, in GiB."""
    return f"{count / 2**30:.2f} GiB"
