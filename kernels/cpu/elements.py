"""Numbers in memory as compiled CPU kernels read and write them: float32, or bfloat16 on the way.

Kernels take addresses instead of arrays: turning a tensor into an array costs as much as a
kernel over one row. A launcher therefore checks shapes, dtypes and strides (:func:`address`)
before it hands them out.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from trunkline.kernels.layout import Layout

from .threads import OPTIONS, float32s, team_size, uint16s

LOOPS: dict[str, Any] = {"fastmath": {"reassoc", "contract", "arcp"}, **OPTIONS}  # NaN and infinity stay what they are


def _float_of_bits(typing: Any, bits: Any) -> Any:
    return types.float32(types.int32), lambda context, b, sig, args: b.bitcast(args[0], ir.FloatType())


def _bits_of_float(typing: Any, value: Any) -> Any:
    return types.int32(types.float32), lambda context, b, sig, args: b.bitcast(args[0], ir.IntType(32))


float_of_bits = intrinsic(_float_of_bits)
bits_of_float = intrinsic(_bits_of_float)


def _read_half(address: int, i: int) -> Any:
    return float_of_bits(np.int32(np.uint32(uint16s(address)[i]) << np.uint32(16)))


def _read_float(address: int, i: int) -> Any:
    return float32s(address)[i]


def _write_half(address: int, i: int, value: Any) -> None:
    bits = np.uint32(bits_of_float(value))
    even = (bits >> np.uint32(16)) & np.uint32(1)  # to nearest, ties to even
    uint16s(address)[i] = np.uint16((bits + np.uint32(0x7FFF) + even) >> np.uint32(16))


def _write_float(address: int, i: int, value: Any) -> None:
    float32s(address)[i] = value


def access(dtype: torch.dtype) -> tuple[Any, Any, int]:
    """Compiled ``read(address, i) -> float32`` and ``write(address, i, float32)``, and bytes a number."""
    if dtype == torch.bfloat16:
        return njit(**OPTIONS)(_read_half), njit(**OPTIONS)(_write_half), 2
    return njit(**OPTIONS)(_read_float), njit(**OPTIONS)(_write_float), 4


def address(tensor: torch.Tensor, name: str, dtype: torch.dtype | None = None) -> int:
    """Where a contiguous CPU tensor of ``dtype`` (None: float32 or bfloat16) starts; ValueError otherwise."""
    known = tensor.dtype in (torch.float32, torch.bfloat16) if dtype is None else tensor.dtype == dtype
    if not (known and tensor.is_contiguous() and tensor.is_cpu):
        raise ValueError(f"{name} must be a contiguous CPU tensor of {dtype or 'float32 or bfloat16'}")
    return tensor.data_ptr()


def layout_of(layout: Layout, which: np.ndarray) -> dict[str, int]:
    """The arguments that tell an attention loop where its rows are: those of numbers ``which``, int32."""
    return {
        "table": _start(layout.table),
        "max_len": layout.table.shape[1],
        "table_row": _start(layout.table_row),
        "q_start": _start(layout.q_start),
        "kv_len": _start(layout.kv_len),
        "which": _start(which),
    }


def _start(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])  # ``array.ctypes.data`` takes several times longer


def team_for(elements: int) -> int:
    """Threads worth using for one pass over so many numbers: waking them takes some microseconds."""
    return team_size(elements > 1 << 15)
