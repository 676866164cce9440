"""The loop of :mod:`trunkline.kernels.kv_write`."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from numba import njit

from .threads import OPTIONS, Task, int32s, int64s, team_size, thread, threads, uint16s

_SERIAL = 1 << 16  # elements of keys below which waking the other threads costs more than it saves


class Arguments:
    """What the loop gets: addresses, sizes, strides in elements."""

    slots: int
    rows: int
    groups: int  # heads of keys and values
    size: int  # bytes a number
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
    """``keys[out_slots[t]] = k[t]``, likewise values; elements of 2 or 4 bytes, heads of ``k`` and ``v`` contiguous."""
    _task().run(
        team_size(k.numel() > _SERIAL),
        slots=out_slots.data_ptr(),
        rows=k.shape[0],
        groups=k.shape[1],
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
def _task() -> Task:
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
            for g in range(a.groups):
                place = slot * a.groups + g
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

    return Task(body, Arguments)
