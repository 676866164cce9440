"""Write new keys and values into their slots of the KV pool: one launch for both."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import plans
from .launch import architecture, token_major


def write(k: torch.Tensor, v: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, out_slots: torch.Tensor) -> None:
    """:func:`trunkline.kernels.kv_write.write_reference` as a Triton kernel. ``keys`` and ``values`` are contiguous."""
    k, v, tokens = token_major(k), token_major(v), len(out_slots)
    k_width, v_width = keys[0].numel(), values[0].numel()
    plan = plans.rows(architecture(), max(k_width, v_width))
    write_kernel[(triton.cdiv(tokens, plan.block_m),)](
        k, v, keys, values, out_slots, tokens, K_TOKEN=k.stride(0), V_TOKEN=v.stride(0), K_WIDTH=k_width,
        V_WIDTH=v_width, BLOCK_M=plan.block_m, BLOCK_N=plan.block_n, num_warps=plan.warps,
    )  # fmt: skip


@triton.jit(do_not_specialize=("out_slots", "tokens"))
def write_kernel(
    k: tl.tensor, v: tl.tensor, keys: tl.tensor, values: tl.tensor, out_slots: tl.tensor, tokens: tl.tensor,
    K_TOKEN: tl.constexpr, V_TOKEN: tl.constexpr, K_WIDTH: tl.constexpr, V_WIDTH: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:  # fmt: skip
    """Grid (blocks of tokens)."""
    token, column = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    present = token < tokens
    slot = tl.load(out_slots + token, present, other=0)
    in_k = present[:, None] & (column < K_WIDTH)[None]
    key = tl.load(k + token[:, None] * K_TOKEN + column[None], in_k, other=0.0)
    tl.store(keys + slot[:, None] * K_WIDTH + column[None], key.to(keys.dtype.element_ty), in_k)
    in_v = present[:, None] & (column < V_WIDTH)[None]
    value = tl.load(v + token[:, None] * V_TOKEN + column[None], in_v, other=0.0)
    tl.store(values + slot[:, None] * V_WIDTH + column[None], value.to(values.dtype.element_ty), in_v)
