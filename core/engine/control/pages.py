"""Memory of tensors, given back to the system and taken again at the same addresses, page by page.

Kernels keep addresses of weights and of the KV pool, so both stay where they are: only the pages behind them go.
"""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import torch

Region = tuple[int, int]
"""Addresses ``[start, end)``."""

LEAST = 4 * mmap.PAGESIZE  # bytes; smaller tensors aren't worth a system call
MADV_DONTNEED = 4  # Linux; elsewhere the word means something else
SKIPPED = (type, ModuleType, str, bytes, int, float)


def supported() -> bool:
    """Can memory be given back here?"""
    return sys.platform == "linux"


def pages_of(tensors: Iterable[torch.Tensor]) -> list[Region]:
    """Whole pages that hold nothing but these tensors, sorted and disjoint."""
    merged: list[Region] = []
    for start, size in sorted(filter(None, map(_memory_of, tensors))):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], start + size)
        else:
            merged.append((start, start + size))
    page = mmap.PAGESIZE
    inner = [(-(-start // page) * page, end // page * page) for start, end in merged]
    return [(start, end) for start, end in inner if end - start >= LEAST]


def _memory_of(tensor: torch.Tensor) -> Region | None:
    """Address and size in bytes of a tensor's whole storage on the CPU."""
    if tensor.device.type != "cpu":
        return None
    if tensor.is_mkldnn:  # oneDNN's own layout, without a storage
        return torch.ops.mkldnn.data_ptr(tensor), torch.ops.mkldnn._nbytes(tensor)
    storage = tensor.untyped_storage()
    return (storage.data_ptr(), storage.nbytes()) if storage.nbytes() else None


def tensors_of(root: Any) -> Iterator[torch.Tensor]:
    """Every tensor that is reachable from an object, through whatever holds it but modules and classes."""
    seen, pending = {id(root)}, [root]
    while pending:
        one = pending.pop()
        if isinstance(one, torch.Tensor):
            yield one
        # A function refers to all of its module; what it has taken along is in its closure.
        inner = [one.__closure__, one.__defaults__] if isinstance(one, FunctionType) else gc.get_referents(one)
        for other in inner:
            if not isinstance(other, SKIPPED) and id(other) not in seen:
                seen.add(id(other))
                pending.append(other)


def without(regions: Sequence[Region], others: Sequence[Region]) -> list[Region]:
    """The ``regions`` that share no byte with ``others``."""
    return [(start, end) for start, end in regions if not any(a < end and start < b for a, b in others)]


def size_of(regions: Sequence[Region]) -> int:
    """Bytes."""
    return sum(end - start for start, end in regions)


def give_back(regions: Sequence[Region]) -> None:
    """The system takes the pages; they read as zeros from now on. OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    for start, end in regions:
        if libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), MADV_DONTNEED):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))


class Saved:
    """The contents of pages, in a file without a name; the disk space is free when this object is."""

    def __init__(self, regions: Sequence[Region], folder: Path) -> None:
        """Write them, and keep nothing of it in memory. OSError when there is no room, and nothing is kept."""
        self.regions = list(regions)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        needed, free = size_of(regions), shutil.disk_usage(folder).free
        if needed > free:
            raise OSError(f"{needed} bytes are needed in {folder}, {free} are free")
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 (it lives as long as this object)
        for region in self.regions:
            view = _view(region)
            while view:
                view = view[self._file.write(view) or 0 :]
        os.fsync(self._file.fileno())
        os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # the page cache is memory, too

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()

    def restore(self) -> None:
        """Read them to where they were. OSError, also when some can't be read."""
        self._file.seek(0)
        for region in self.regions:
            view = _view(region)
            while view:
                count = self._file.readinto(view)
                if not count:
                    raise OSError("the file with the weights is cut short")
                view = view[count:]


def _view(region: Region) -> memoryview:
    start, end = region
    return memoryview((ctypes.c_ubyte * (end - start)).from_address(start)).cast("B")
