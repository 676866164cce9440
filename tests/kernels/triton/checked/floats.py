"""Values of the float types that numpy doesn't have, which the interpreter keeps as bits, and TF32 rounding.

Upstream computes with the bits of bfloat16 as if they were integers, and truncates in casts.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl

Array = np.ndarray[Any, Any]

_FP8 = {
    tl.float8e5: torch.float8_e5m2,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5b16: torch.float8_e5m2fnuz,
    tl.float8e4b8: torch.float8_e4m3fnuz,
}
_VALUES = {  # of all 256 bit patterns
    kind: torch.arange(256, dtype=torch.uint8).view(name).float().numpy() for kind, name in _FP8.items()
}


def is_bits(kind: tl.dtype) -> bool:
    """Whether values of this scalar type are kept as bits."""
    return kind == tl.bfloat16 or kind in _FP8


def decode(data: Array, kind: tl.dtype) -> Array:
    """The values of ``data`` as float32, or ``data`` itself when they aren't kept as bits."""
    if kind == tl.bfloat16:
        return (data.astype(np.uint32) << 16).view(np.float32)
    return _VALUES[kind][data] if kind in _FP8 else data


def encode(values: Array, kind: tl.dtype, truncate: bool = False) -> Array:
    """The bits of ``values`` in ``kind``, rounded to nearest, ties to even, or towards zero.

    fp8 saturates at the largest finite number, as NVIDIA's conversion instructions do.
    """
    values = np.asarray(values, np.float32)
    if kind == tl.bfloat16:
        bits = np.ascontiguousarray(values).view(np.uint32).reshape(values.shape)
        up = np.uint32(0) if truncate else ((bits >> 16) & 1) + np.uint32(0x7FFF)
        rounded = ((bits + up) >> 16).astype(np.uint16)
        return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)
    if truncate:
        raise NotImplementedError("the checked interpreter rounds fp8 to nearest even only")
    limit = torch.finfo(_FP8[kind]).max
    clipped = torch.from_numpy(np.clip(values, -limit, limit))
    return clipped.to(_FP8[kind]).view(torch.uint8).numpy().reshape(values.shape)


def round_to_tf32(values: Array) -> Array:
    """float32 values with the 10 bits of mantissa that TF32 tensor cores read."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)
    return np.where(np.isfinite(values), rounded, values)
