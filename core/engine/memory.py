"""Plans the size of all models' KV pools before any of them is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trunkline.core.errors import ModelError

CPU_SHARE = 0.4  # of what is left after all weights
CPU_LIMIT = 4 << 30  # bytes; more is rarely used by a CPU server and only slows its start
WORTHWHILE = 16  # a pool of so many full contexts is enough for anybody


@dataclass(frozen=True, slots=True)
class Demand:
    """One model's wishes: bytes of weights, bytes of KV per token, context in tokens.

    ``tokens`` is the user's ``--max-total-tokens``; None = as many as fit. A model with
    ``token_bytes`` 0 keeps nothing between passes (encoders) and computes about ``pass_tokens`` in one.
    """

    name: str
    weight_bytes: int
    token_bytes: int
    context: int
    tokens: int | None = None
    pass_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Grant:
    """What a model gets: slots (tokens) in its pool, and the context that fits them.

    Without a pool, slots only bound the tokens of one pass.
    """

    name: str
    weight_bytes: int
    kv_bytes: int
    slots: int
    context: int


def plan(demands: Sequence[Demand], *, available: int, budget: int | None = None) -> list[Grant]:
    """Split the KV budget evenly over the models that use one.

    ``budget`` is the user's bound in bytes; None = 40% of what the weights leave, 4 GiB at most.
    Raises ModelError, naming the numbers, when weights don't fit, no token does, or more was asked
    for than is free.
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
        most = demand.tokens or max(demand.pass_tokens, demand.context)  # a text is computed in one pass
        return Grant(demand.name, demand.weight_bytes, 0, most, min(demand.context, most))
    slots = demand.tokens
    if slots is None:
        slots = min(share // demand.token_bytes, WORTHWHILE * demand.context)
    if slots < 1:
        raise ModelError(
            f"No room for the KV cache of {demand.name}: a token takes {demand.token_bytes} bytes "
            f"and {max(share, 0)} are left. Raise --kv-cache-bytes, lower another model's --max-total-tokens "
            "or load fewer models."
        )
    context = min(demand.context, slots)
    return Grant(demand.name, demand.weight_bytes, slots * demand.token_bytes, slots, context)


def gib(count: float) -> str:
    """Bytes for people."""
    return f"{count / 2**30:.2f} GiB"
