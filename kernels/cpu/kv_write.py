"""The compiled CPU kernel of :mod:`trunkline.kernels.kv_write`."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from numba import njit

from .threads import OPTIONS, Kernel, int32s, int64s, team_size, thread, threads, uint16s

_MIN_PARALLEL = 1 << 16  # elements of ``k``; below, waking the other threads costs more than it saves


class Arguments:
    """The kernel's arguments: addresses, sizes, strides in elements."""

    slots: int
    rows: int
    kv_heads: int
    size: int  # bytes of one number
    k: int
    k_token: int
    k_head: int
    k_width: int
    keys: int
    v: int
    v_token: int
    v_head: int
    v_width: int
    values: int


def write(k: torch.Tensor, v: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, out_slots: torch.Tensor) -> None:
    """``keys[out_slots[t]] = k[t]`` and ``values[out_slots[t]] = v[t]``; the caller checks the arguments.

    ``k`` [T, KV, D] and ``v`` [T, KV, Dv] have contiguous heads; ``keys`` [slots, KV, D] and ``values``
    [slots, KV, Dv] are contiguous. All have elements of the same 2 or 4 bytes. ``out_slots`` int64 [T].
    """
    _kernel().run(
        team_size(k.numel() > _MIN_PARALLEL),
        slots=out_slots.data_ptr(),
        rows=k.shape[0],
        kv_heads=k.shape[1],
        size=keys.element_size(),
        k=k.data_ptr(),
        k_token=k.stride(0),
        k_head=k.stride(1),
        k_width=k.shape[2],
        keys=keys.data_ptr(),
        v=v.data_ptr(),
        v_token=v.stride(0),
        v_head=v.stride(1),
        v_width=v.shape[2],
        values=values.data_ptr(),
    )


@cache
def _kernel() -> Kernel:
    def copy(source: int, target: int, n: int, size: int) -> None:
        if size == 4:
            wide, wide_target = int32s(source), int32s(target)
            for i in range(n):
                wide_target[i] = wide[i]
        else:
            narrow, narrow_target = uint16s(source), uint16s(target)
            for i in range(n):
                narrow_target[i] = narrow[i]

    copy = njit(**OPTIONS)(copy)

    def body(a: Any) -> None:
        for t in range(a.rows * thread() // threads(), a.rows * (thread() + 1) // threads()):
            slot = int64s(a.slots)[t]
            for g in range(a.kv_heads):
                place = slot * a.kv_heads + g
                copy(
                    a.k + (t * a.k_token + g * a.k_head) * a.size,
                    a.keys + place * a.k_width * a.size,
                    a.k_width,
                    a.size,
                )
                copy(
                    a.v + (t * a.v_token + g * a.v_head) * a.size,
                    a.values + place * a.v_width * a.size,
                    a.v_width,
                    a.size,
                )

    return Kernel(body, Arguments)
