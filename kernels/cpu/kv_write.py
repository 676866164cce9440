"""The compiled CPU kernel of :mod:`trunkline.kernels.kv_write`."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from numba import njit

from .quantized import cache as int8_cache
from .threads import OPTIONS, Kernel, int32s, int64s, team_size, thread, threads, uint16s

# Elements of ``k``; below, waking the other threads costs more than it saves.
_MIN_COPIED, _MIN_QUANTIZED = 1 << 16, 1 << 15


class Arguments:
    """The kernel's arguments: addresses, sizes, strides in elements, but for those of the pool."""

    slots: int
    rows: int
    kv_heads: int
    size: int  # bytes of one number of ``k`` and ``v``
    k: int
    k_token: int
    k_head: int
    k_width: int
    keys: int
    key_bytes: int  # of one head in the pool
    v: int
    v_token: int
    v_head: int
    v_width: int
    values: int
    value_bytes: int


def write(k: torch.Tensor, v: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, out_slots: torch.Tensor) -> None:
    """``keys[out_slots[t]] = k[t]`` and ``values[out_slots[t]] = v[t]``; the caller checks the arguments.

    ``k`` [T, KV, D] and ``v`` [T, KV, Dv] have contiguous heads; ``keys`` [slots, KV, D] and ``values``
    [slots, KV, Dv] are contiguous. All have elements of the same 2 or 4 bytes; or those of the pool are int8, and
    ``k`` and ``v``, of one dtype, float32 or bfloat16, are quantised. ``out_slots`` int64 [T].
    """
    quantized = keys.dtype == torch.int8
    _kernel(k.dtype if quantized else None).run(
        team_size(k.numel() > (_MIN_QUANTIZED if quantized else _MIN_COPIED)),
        slots=out_slots.data_ptr(),
        rows=k.shape[0],
        kv_heads=k.shape[1],
        size=k.element_size(),
        k=k.data_ptr(),
        k_token=k.stride(0),
        k_head=k.stride(1),
        k_width=k.shape[2],
        keys=keys.data_ptr(),
        key_bytes=keys.shape[2] * keys.element_size(),
        v=v.data_ptr(),
        v_token=v.stride(0),
        v_head=v.stride(1),
        v_width=v.shape[2],
        values=values.data_ptr(),
        value_bytes=values.shape[2] * values.element_size(),
    )


@cache
def _kernel(quantized: torch.dtype | None) -> Kernel:
    """The kernel that quantises numbers of this dtype, or copies them."""

    def copy(source: int, n: int, size: int, target: int) -> None:
        if size == 4:
            wide, wide_target = int32s(source), int32s(target)
            for i in range(n):
                wide_target[i] = wide[i]
        else:
            narrow, narrow_target = uint16s(source), uint16s(target)
            for i in range(n):
                narrow_target[i] = narrow[i]

    store = njit(**OPTIONS)(copy) if quantized is None else int8_cache.storing(quantized)

    def body(a: Any) -> None:
        for t in range(a.rows * thread() // threads(), a.rows * (thread() + 1) // threads()):
            slot = int64s(a.slots)[t]
            for g in range(a.kv_heads):
                place = slot * a.kv_heads + g
                k, v = a.k + (t * a.k_token + g * a.k_head) * a.size, a.v + (t * a.v_token + g * a.v_head) * a.size
                store(k, a.k_width, a.size, a.keys + place * a.key_bytes)
                store(v, a.v_width, a.size, a.values + place * a.value_bytes)

    return Kernel(body, Arguments)
