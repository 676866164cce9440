"""Compiled reading and writing of keys and values in the format of :mod:`trunkline.kernels.quantized.cache`."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from numba import njit, types
from numba.extending import intrinsic

from trunkline.kernels.cpu.threads import OPTIONS, Kernel, float32s, int64s, team_size, thread, threads
from trunkline.kernels.cpu.vectors import INT, LANES, Vectors, generator
from trunkline.kernels.quantized.cache import SCALE_BYTES, stored_width

from .rows import quantizer

_MIN_PARALLEL = 1 << 15  # elements of ``k``; below, waking the other threads costs more than it saves

row_bytes = njit(**OPTIONS)(stored_width)


def _load(typing: Any, source: Any, target: Any, n: Any, factor: Any) -> Any:
    """``load(source, target, n, factor)``: copy a key or value of ``n`` numbers as float32.

    Each is multiplied by the scale times ``factor``, so the signature is that of :func:`.flash_tiles.convert`'s.
    """

    def emit(v: Vectors, source: Any, target: Any, n: Any, factor: Any) -> None:
        builder = v.builder
        before = builder.and_(builder.add(n, INT(SCALE_BYTES - 1)), INT(-SCALE_BYTES))
        scale = builder.fmul(v.load(builder.add(source, before), lanes=1), factor)
        scales = v.broadcast(scale)

        def some(first: Any, lanes: int) -> list[Any]:
            numbers = v.load_int8(builder.add(source, first), lanes)
            v.store(builder.fmul(numbers, scales if lanes == LANES else scale), v.at(target, 4, first), lanes=lanes)
            return []

        whole = builder.and_(n, INT(-LANES))
        with builder.if_then(builder.icmp_signed(">", whole, INT(0))):
            v.loop(builder.udiv(whole, INT(LANES)), [], lambda i, _: some(builder.mul(i, INT(LANES)), LANES))
        with builder.if_then(builder.icmp_signed(">", n, whole)):
            v.loop(builder.sub(n, whole), [], lambda i, _: some(builder.add(whole, i), 1))

    return types.void(*[types.int64] * 3, types.float32), generator(emit)


load = intrinsic(_load)


class Arguments:
    """The arguments of the writing kernel: addresses, sizes, strides in elements."""

    slots: int
    rows: int
    kv_heads: int
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
    """``keys[out_slots[t]] = quantize(k[t])`` and the same for values; the caller checks the arguments.

    ``k`` [T, KV, D] and ``v`` [T, KV, Dv], of one dtype, float32 or bfloat16, have contiguous heads; ``keys``
    [slots, KV, stored width] and ``values`` are contiguous int8. ``out_slots`` int64 [T].
    """
    _kernel(k.dtype).run(
        team_size(k.numel() > _MIN_PARALLEL),
        slots=out_slots.data_ptr(),
        rows=k.shape[0],
        kv_heads=k.shape[1],
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
def _kernel(dtype: torch.dtype) -> Kernel:
    quantize, size = quantizer(dtype, 1), dtype.itemsize

    def store(source: int, n: int, target: int) -> None:
        scale, _ = quantize(source, 0, n, target)
        float32s(target + row_bytes(n) - SCALE_BYTES)[0] = scale

    store = njit(**OPTIONS)(store)

    def body(a: Any) -> None:
        for t in range(a.rows * thread() // threads(), a.rows * (thread() + 1) // threads()):
            for g in range(a.kv_heads):
                place = int64s(a.slots)[t] * a.kv_heads + g
                k, v = a.k + (t * a.k_token + g * a.k_head) * size, a.v + (t * a.v_token + g * a.v_head) * size
                store(k, a.k_width, a.keys + place * row_bytes(a.k_width))
                store(v, a.v_width, a.values + place * row_bytes(a.v_width))

    return Kernel(body, Arguments)
