"""The KV pool: memory for keys and values, the free slots, and the table from requests to slots.

A *slot* is space for one token's keys and values in every layer of one model. The docstring of
:class:`trunkline.kernels.layout.Layout` shows how attention finds keys by row, slot table and pool.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from trunkline.kernels.quantized.cache import stored_width

KVShape = tuple[int, int, int]
"""One layer's ``(kv_heads, key_dim, value_dim)``."""

_FREE = -1
_ALIGNMENT = 64  # bytes; a cache line, and the widest vector load


class SlotPool:
    """Allocates slot numbers ``[0, capacity)``; each slot has at most one owner."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.free = capacity
        # Free slots are at [0, free); the last of them is allocated next.
        self._stack = np.arange(capacity - 1, -1, -1, dtype=np.int32)
        self._state = np.full(capacity, _FREE, dtype=np.int32)  # _FREE, or any other value

    def allocate(self, count: int) -> np.ndarray | None:
        """Allocate ``count`` slots, int32 ``[count]``. None, and nothing changes, if fewer are free."""
        if count > self.free:
            return None
        slots = self._stack[self.free - count : self.free][::-1].copy()
        self.free -= count
        self._state[slots] = 0
        return slots

    def release(self, slots: np.ndarray) -> None:
        """Free slots. AssertionError if one isn't of this pool, is already free, or is given twice.

        The check is always on: a slot with two owners would silently corrupt another request's result.
        """
        count = len(slots)
        if count == 0:
            return
        if slots.min() < 0 or slots.max() >= self.capacity or (self._state[slots] == _FREE).any():
            raise AssertionError("a slot was released that is not allocated")
        order = np.arange(count, dtype=np.int32)
        self._state[slots] = order  # of a duplicate, only the last number stays
        if (self._state[slots] != order).any():
            raise AssertionError("a slot was released twice in one call")
        self._state[slots] = _FREE
        self._stack[self.free : self.free + count] = slots[::-1]
        self.free += count


class SlotTable:
    """The slot of each running request's tokens: ``slots[row, position]``, int32 ``[rows, max_len]``.

    The operating system provides memory only for the pages that are written. A row's entries beyond the
    allocated tokens of its request are stale. Only :meth:`write` and :meth:`write_each` may change it.
    """

    def __init__(self, rows: int, max_len: int) -> None:
        self.slots = np.zeros((rows, max_len), dtype=np.int32)
        self._free = list(range(rows - 1, -1, -1))
        self._changes: list[tuple[Sequence[int] | int, Sequence[int] | range]] | None = None

    @property
    def max_len(self) -> int:
        return int(self.slots.shape[1])

    def take(self) -> int | None:
        """Assign a row to a request; None if all are taken."""
        return self._free.pop() if self._free else None

    def write(self, row: int, start: int, slots: np.ndarray) -> None:
        """Set a row's entries from position ``start`` on."""
        end = start + len(slots)
        self.slots[row, start:end] = slots
        if self._changes is not None:
            self._changes.append((row, range(start, end)))

    def write_each(self, rows: Sequence[int], positions: Sequence[int], slots: np.ndarray) -> None:
        """Set one entry in each of some rows."""
        self.slots[rows, positions] = slots
        if self._changes is not None:
            self._changes.append((rows, positions))

    def changes(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows and positions, int64 each, of the entries that were set since the last call; none at the first one."""
        changes, self._changes = self._changes or [], []
        if not changes:
            return np.empty(0, np.int64), np.empty(0, np.int64)
        pairs = [np.broadcast_arrays(rows, positions) for rows, positions in changes]
        rows, positions = (np.concatenate(side).astype(np.int64) for side in zip(*pairs, strict=True))
        return rows, positions

    def give(self, row: int) -> None:
        """Free a request's row. AssertionError if it is already free."""
        if row in self._free:
            raise AssertionError("a row of the slot table was given back twice")
        self._free.append(row)


class KVPool:
    """Keys and values of all slots: for each layer ``[slots + 1, kv_heads, dim]``; dims of keys and values may differ.

    With the dtype int8, each is quantised, and dim is that of :func:`.stored_width`.
    The last slot belongs to no request: rows that only fill up a CUDA graph write to it.
    """

    def __init__(self, shapes: Sequence[KVShape], slots: int, dtype: torch.dtype, device: torch.device | str) -> None:
        self.slots = slots
        stored = [_stored(shape, dtype) for shape in shapes]
        self.keys = [_zeros((slots + 1, heads, key_dim), dtype, device) for heads, key_dim, _ in stored]
        self.values = [_zeros((slots + 1, heads, value_dim), dtype, device) for heads, _, value_dim in stored]

    @staticmethod
    def bytes_per_token(shapes: Sequence[KVShape], dtype: torch.dtype) -> int:
        """Bytes of one slot, over all layers."""
        stored = [_stored(shape, dtype) for shape in shapes]
        return sum(heads * (key_dim + value_dim) for heads, key_dim, value_dim in stored) * dtype.itemsize


def _stored(shape: KVShape, dtype: torch.dtype) -> KVShape:
    """The shape with the widths that keys and values have in a pool of ``dtype``."""
    heads, key_dim, value_dim = shape
    return (heads, stored_width(key_dim), stored_width(value_dim)) if dtype == torch.int8 else shape


def _zeros(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
    """Zeroed memory; on a CPU, the operating system provides pages only when they are first used.

    Zeroed, because kernels may read masked slots, and a NaN there would spread in spite of the mask.
    ``torch.zeros`` would write gigabytes at start-up on a CPU.
    """
    if torch.device(device).type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size = shape[0] * shape[1] * shape[2] * dtype.itemsize
    memory = np.zeros(size + _ALIGNMENT, dtype=np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return torch.from_numpy(memory[start : start + size]).view(dtype).view(shape)
