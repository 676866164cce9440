"""How compiled CPU kernels get at tensors: addresses, and reading and writing numbers as float32 or bfloat16.

Kernels take addresses instead of arrays, because converting a tensor to an array costs as much as
a kernel over one row. So the function that launches a kernel checks shapes, dtypes and strides first
(:func:`address`).
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

LOOPS: dict[str, Any] = {"fastmath": {"reassoc", "contract", "arcp"}, **OPTIONS}  # NaN and infinity are preserved


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
    """Compiled ``read(address, i) -> float32`` and ``write(address, i, float32)``, and the bytes of one number."""
    if dtype == torch.bfloat16:
        return njit(**OPTIONS)(_read_half), njit(**OPTIONS)(_write_half), 2
    return njit(**OPTIONS)(_read_float), njit(**OPTIONS)(_write_float), 4


def address(tensor: torch.Tensor, name: str, dtype: torch.dtype | None = None) -> int:
    """The address of a contiguous CPU tensor of ``dtype`` (None: float32 or bfloat16); ValueError for any other."""
    known = tensor.dtype in (torch.float32, torch.bfloat16) if dtype is None else tensor.dtype == dtype
    if not (known and tensor.is_contiguous() and tensor.is_cpu):
        raise ValueError(f"{name} must be a contiguous CPU tensor of {dtype or 'float32 or bfloat16'}")
    return tensor.data_ptr()


def layout_of(layout: Layout, row_ids: np.ndarray) -> dict[str, int]:
    """The layout as arguments of an attention kernel that computes the rows ``row_ids``, int32 [N]."""
    return {
        "table": _start(layout.table),
        "max_len": layout.table.shape[1],
        "table_row": _start(layout.table_row),
        "q_start": _start(layout.q_start),
        "kv_len": _start(layout.kv_len),
        "row_ids": _start(row_ids),
    }


def _start(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])  # several times faster than ``array.ctypes.data``


def team_for(elements: int) -> int:
    """How many threads to use for one pass over ``elements`` numbers: one if waking the others costs more."""
    return team_size(elements > 1 << 15)
