"""The KV pool: memory for keys and values, the free slots, and the table from requests to slots.

A *slot* is space for one token's keys and values in every layer of one model.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

KVShape = tuple[int, int, int]
"""One layer's ``(kv_heads, key_dim, value_dim)``."""

_FREE = -1
_ALIGNMENT = 64  # bytes; a cache line, and the widest vector load


class SlotPool:
    """Hands out slot numbers ``[0, capacity)``; each has one owner at a time."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.free = capacity
        self._stack = np.arange(capacity - 1, -1, -1, dtype=np.int32)  # the free ones are [0, free)
        self._state = np.full(capacity, _FREE, dtype=np.int32)

    def allocate(self, count: int) -> np.ndarray | None:
        """``count`` slots, int32; None (and nothing changes) when fewer are free."""
        if count > self.free:
            return None
        slots = self._stack[self.free - count : self.free][::-1].copy()
        self.free -= count
        self._state[slots] = 0
        return slots

    def release(self, slots: np.ndarray) -> None:
        """Take slots back. AssertionError when one is foreign, free already, or given twice.

        The check is always on: a slot with two owners is silent corruption of somebody's text.
        """
        count = len(slots)
        if count == 0:
            return
        if slots.min() < 0 or slots.max() >= self.capacity or (self._state[slots] == _FREE).any():
            raise AssertionError("a slot was released that is not allocated")
        order = np.arange(count, dtype=np.int32)
        self._state[slots] = order  # a duplicate keeps only its last number
        if (self._state[slots] != order).any():
            raise AssertionError("a slot was released twice in one call")
        self._state[slots] = _FREE
        self._stack[self.free : self.free + count] = slots[::-1]
        self.free += count


class SlotTable:
    """Where each running request's tokens lie: ``slots[row, position]``, int32 ``[rows, max_len]``.

    Memory is touched only as far as it is written. A row's entries beyond its request's
    allocated tokens are stale.
    """

    def __init__(self, rows: int, max_len: int) -> None:
        self.slots = np.zeros((rows, max_len), dtype=np.int32)
        self._free = list(range(rows - 1, -1, -1))

    @property
    def max_len(self) -> int:
        return int(self.slots.shape[1])

    def take(self) -> int | None:
        """A row for one request, or None when all are taken."""
        return self._free.pop() if self._free else None

    def give(self, row: int) -> None:
        """The row's request left. AssertionError when the row is free already."""
        if row in self._free:
            raise AssertionError("a row of the slot table was given back twice")
        self._free.append(row)


class KVPool:
    """Keys and values of all slots: per layer ``[slots, kv_heads, dim]``, widths may differ."""

    def __init__(self, shapes: Sequence[KVShape], slots: int, dtype: torch.dtype, device: torch.device | str) -> None:
        self.slots = slots
        self.keys = [_zeros((slots, heads, key_dim), dtype, device) for heads, key_dim, _ in shapes]
        self.values = [_zeros((slots, heads, value_dim), dtype, device) for heads, _, value_dim in shapes]

    @staticmethod
    def bytes_per_token(shapes: Sequence[KVShape], dtype: torch.dtype) -> int:
        """Bytes of one slot over all layers."""
        return sum(heads * (key_dim + value_dim) for heads, key_dim, value_dim in shapes) * dtype.itemsize


def _zeros(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
    """Zeroed memory that the operating system provides only where it is touched.

    Zeroed, because a kernel that reads past a row under a mask must not meet a NaN;
    ``torch.zeros`` would touch gigabytes at start-up on a CPU.
    """
    if torch.device(device).type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size = shape[0] * shape[1] * shape[2] * dtype.itemsize
    memory = np.zeros(size + _ALIGNMENT, dtype=np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return torch.from_numpy(memory[start : start + size]).view(dtype).view(shape)
