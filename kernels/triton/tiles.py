"""The loop of all attention kernels: a tile of queries over tiles of keys, with a running softmax (FlashAttention).

A tile has the scores ``[M, BLOCK_N] = query [M, BLOCK_D] @ keys [BLOCK_D, BLOCK_N]``; M are queries times heads that
share a KV head. Exponentials have base 2, and scores are scaled accordingly.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .elements import LOG2E, soft_cap


@triton.jit
def add_tiles(
    result: tl.tensor, largest: tl.tensor, total: tl.tensor, query: tl.tensor, position: tl.tensor, keys: tl.tensor,
    values: tl.tensor, slots: tl.tensor, begin: tl.tensor, end: tl.tensor, low: tl.tensor, high: tl.tensor,
    window: tl.tensor, chunk: tl.tensor, scale: tl.tensor, softcap: tl.tensor, K_SLOT: tl.constexpr,
    V_SLOT: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr, PAGED: tl.constexpr, CAP: tl.constexpr,
    STAGES: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """Add the keys ``[begin, end)`` to a running softmax, and return it.

    ``query`` [M, BLOCK_D] at the positions ``position`` [M]. ``keys`` and ``values`` point to the KV head; ``slots``
    to the row's slots if ``PAGED``, else key ``j`` is in slot ``j``. With ``MASKED``, only the keys ``[low, high)`` are
    read, and each query's mask applies: ``CAUSAL``, ``window``, ``chunk``. Without, every query sees all keys.

    The softmax so far: ``result`` float32 [M, BLOCK_DV], the sum of values times weights; ``total`` [M], the sum of
    weights; both are relative to ``2 ** largest``, ``largest`` [M] being the largest score in base 2.
    """
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    in_d, in_e = d < D, e < DV
    for start in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        j = start + tl.arange(0, BLOCK_N)
        present = (j >= low) & (j < high)
        slot = j.to(tl.int64)
        if PAGED:
            slot = (tl.load(slots + j, present, other=0) if MASKED else tl.load(slots + j)).to(tl.int64)
        k_at = keys + slot[None] * K_SLOT + d[:, None]
        v_at = values + slot[:, None] * V_SLOT + e[None]
        if MASKED:
            k = tl.load(k_at, present[None] & in_d[:, None], other=0.0)
            v = tl.load(v_at, present[:, None] & in_e[None], other=0.0)
        else:
            k = tl.load(k_at) if D == BLOCK_D else tl.load(k_at, in_d[:, None], other=0.0)
            v = tl.load(v_at) if DV == BLOCK_DV else tl.load(v_at, in_e[None], other=0.0)
        score = tl.dot(query, k.to(query.dtype), input_precision="ieee") * scale
        if CAP:
            score = soft_cap(score, softcap)
        score = score * LOG2E
        if MASKED:
            distance = position[:, None] - j[None]
            seen = tl.broadcast_to(present[None], score.shape)
            if CAUSAL:
                seen = seen & (distance >= 0)
            if window > 0:
                seen = seen & (distance < window) & (distance > -window)
            if chunk > 0:
                seen = seen & (position[:, None] // chunk == j[None] // chunk)
            score = tl.where(seen, score, -float("inf"))
        new_largest = tl.maximum(largest, tl.max(score, 1))
        origin = tl.where(new_largest == -float("inf"), 0.0, new_largest) if MASKED else new_largest
        weight = tl.exp2(score - origin[:, None])
        kept = tl.exp2(largest - origin)
        total = total * kept + tl.sum(weight, 1)
        result = result * kept[:, None] + tl.dot(weight.to(v.dtype), v, input_precision="ieee")
        largest = new_largest
    return result, largest, total
