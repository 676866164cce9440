"""Plans the size of all models' KV pools before any of them is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trunkline.core.errors import ModelError

from .candidates import Candidate

CPU_SHARE = 0.4  # of the memory that all weights leave free
CPU_LIMIT = 4 << 30  # bytes; a CPU server rarely uses more, and a larger pool slows its start
MAX_CONTEXTS = 16  # a pool holds at most this many sequences of full context length


@dataclass(frozen=True, slots=True)
class MemoryShare:
    """The memory of one model: slots (tokens) of its KV pool, and the context length that fits in them.

    Without a pool (``kv_bytes`` 0), slots only bound the tokens of one pass.
    """

    kv_bytes: int
    slots: int
    context: int


def plan(candidates: Sequence[Candidate], *, available: int, budget: int | None = None) -> list[MemoryShare]:
    """Divide the memory for keys and values evenly among the models that have a KV pool.

    ``available``: bytes that this process may use. ``budget``: the user's bound for all pools, in bytes;
    None = 40% of what the weights leave, at most 4 GiB. ModelError, with the numbers, when the weights
    don't fit, when a pool has no room for a token, or when pools and weights exceed ``available``.
    """
    weights = sum(one.plan.weight_bytes for one in candidates)
    if weights >= available:
        raise ModelError(
            f"The weights need {gib(weights)} but {gib(available)} of memory is free. "
            "Load fewer models or a smaller dtype."
        )
    if budget is None:
        budget = min(int((available - weights) * CPU_SHARE), CPU_LIMIT)
    users = [one for one in candidates if one.plan.kv_bytes_per_token]
    left = budget - sum(one.plan.kv_bytes_per_token * (one.settings.max_total_tokens or 0) for one in users)
    sharers = sum(one.settings.max_total_tokens is None for one in users)
    grants = [_grant(one, left // max(sharers, 1)) for one in candidates]
    pools = sum(grant.kv_bytes for grant in grants)
    if weights + pools > available:
        raise ModelError(
            f"KV pools of {gib(pools)} and weights of {gib(weights)} don't fit in the {gib(available)} of memory that "
            "is free. Lower --max-total-tokens or --kv-cache-bytes."
        )
    return grants


def _grant(one: Candidate, share: int) -> MemoryShare:
    context, token_bytes, asked = one.info.context_length, one.plan.kv_bytes_per_token, one.settings.max_total_tokens
    if not token_bytes:  # an encoder keeps nothing between passes
        one_pass = one.pass_tokens or MAX_CONTEXTS * context
        most = asked or max(one_pass, context)  # a text is computed in one pass, so it must fit
        return MemoryShare(0, most, min(context, most))
    slots = asked
    if slots is None:
        slots = min(share // token_bytes, MAX_CONTEXTS * context)
    if slots < 1:
        raise ModelError(
            f"No room for the KV cache of {one.name}: a token takes {token_bytes} bytes "
            f"and {max(share, 0)} are left. Raise --kv-cache-bytes, lower another model's --max-total-tokens "
            "or load fewer models."
        )
    return MemoryShare(slots * token_bytes, slots, min(context, slots))


def gib(count: float) -> str:
    """``count`` bytes as text, in GiB."""
    return f"{count / 2**30:.2f} GiB"
