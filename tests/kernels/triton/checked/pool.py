"""Tensors of many gigabytes that take no memory, for kernels whose offsets exceed int32."""

from __future__ import annotations

import math
import mmap

import torch


def virtual_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor of zeros whose pages get memory when they are first written or read. Fill single rows only."""
    size = math.prod(shape) * dtype.itemsize
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    pages = mmap.mmap(-1, size, flags=flags)
    return torch.frombuffer(pages, dtype=dtype).view(shape)
