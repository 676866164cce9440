"""Compiled reading and writing of keys and values in the format of :mod:`trunkline.kernels.quantized.cache`."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from numba import njit, types
from numba.extending import intrinsic

from trunkline.kernels.cpu.threads import OPTIONS, float32s
from trunkline.kernels.cpu.vectors import INT, LANES, Vectors, generator
from trunkline.kernels.quantized.cache import SCALE_BYTES, stored_width

from .rows import quantizer

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


@cache
def storing(dtype: torch.dtype) -> Any:
    """Compiled ``store(source, n, size, target)``: quantise a key or value of ``n`` numbers of ``dtype``."""
    quantize = quantizer(dtype, 1)

    def store(source: int, n: int, _: int, target: int) -> None:
        scale, _total = quantize(source, 0, n, target)
        float32s(target + row_bytes(n) - SCALE_BYTES)[0] = scale

    return njit(**OPTIONS)(store)
