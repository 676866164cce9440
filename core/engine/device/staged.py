"""A device with memory of its own, whose copies run after the call that started them has returned.

What a particular device adds are four functions, so that the order of copies and waits is the same code everywhere
and is tested without a GPU.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch

from .base import Device

ALIGNMENT = 16  # bytes; kernels read 16 bytes at a time from addresses that are multiples of it
BUFFERS = 3  # uploads of the batch that is prepared and of the one in flight, and one more
LEAST_BUFFER = 1 << 16  # bytes


class Fence(Protocol):
    """A place in the order of the device's work."""

    def synchronize(self) -> None:
        """Block until the work before it is done."""


class Copied(NamedTuple):
    """Tensors that are being filled; they must not be read on the host before the fence."""

    tensors: list[torch.Tensor]
    fence: Fence


@dataclass(slots=True)
class StagingBuffer:
    """Host memory ``uint8 [N]``. It may be written again when the copy that reads it is done."""

    memory: torch.Tensor
    copied: Fence | None = None


@dataclass(frozen=True, slots=True)
class Download:
    """Copies to the host that are under way."""

    names: list[str]
    copied: Copied

    def wait(self) -> dict[str, torch.Tensor]:
        self.copied.fence.synchronize()
        return dict(zip(self.names, self.copied.tensors, strict=True))


class StagedDevice(Device):
    """All arrays of an upload are packed into one buffer, and copied at once."""

    shares_memory = False

    def __init__(self, kind: torch.device, *, overlaps: bool = True, graph_rows: int = 0) -> None:
        super().__init__(kind, overlaps=overlaps, graph_rows=graph_rows)
        self._ring = [StagingBuffer(torch.empty(0, dtype=torch.uint8)) for _ in range(BUFFERS)]

    @abstractmethod
    def pinned(self, size: int) -> torch.Tensor:
        """New host memory, uint8 ``[size]``, that the device can read while the host does something else."""

    @abstractmethod
    def copy_to_device(self, staged: torch.Tensor) -> Copied:
        """Start a copy of host memory, uint8 ``[N]``, into new device memory: one tensor. It is done before all work
        that is given to the device later; the fence is passed when the host memory may be overwritten."""

    @abstractmethod
    def copy_to_host(self, tensors: Sequence[torch.Tensor]) -> Copied:
        """Start copies of device tensors into new host memory, after the work so far."""

    def upload(self, arrays: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
        ends = np.cumsum([-(-array.nbytes // ALIGNMENT) * ALIGNMENT for array in arrays.values()], dtype=np.int64)
        if not len(ends):
            return {}
        starts = [0, *ends[:-1].tolist()]
        buffer = self._next_buffer(int(ends[-1]))
        memory = buffer.memory.numpy()
        for array, start in zip(arrays.values(), starts, strict=True):
            memory[start : start + array.nbytes] = array.reshape(-1).view(np.uint8)
        (packed,), buffer.copied = self.copy_to_device(buffer.memory[: int(ends[-1])])
        return {
            name: packed[start : start + array.nbytes].view(dtype_of(array)).view(array.shape)
            for (name, array), start in zip(arrays.items(), starts, strict=True)
        }

    def download(self, tensors: Mapping[str, torch.Tensor]) -> Download:
        return Download(list(tensors), self.copy_to_host(list(tensors.values())))

    def _next_buffer(self, size: int) -> StagingBuffer:
        """The buffer that was used the longest time ago, with room for ``size`` bytes."""
        buffer = self._ring.pop(0)
        self._ring.append(buffer)
        if buffer.copied is not None:
            buffer.copied.synchronize()
        if len(buffer.memory) < size:
            buffer.memory = self.pinned(max(LEAST_BUFFER, 1 << (size - 1).bit_length()))
        return buffer


def dtype_of(array: np.ndarray) -> torch.dtype:
    """torch's dtype for an array's."""
    return torch.from_numpy(np.empty(0, array.dtype)).dtype
