"""Releases the memory pages of tensors to the operating system, and restores their contents at the same addresses.

Kernels keep the addresses of weights and of the KV pool, so the address space stays mapped: only its pages are
released.
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

from trunkline.kernels.cpu.threads import Kernel

Region = tuple[int, int]
"""Addresses ``[start, end)``."""

MIN_BYTES = 4 * mmap.PAGESIZE  # smaller tensors aren't worth a system call
MADV_DONTNEED = 4  # on Linux; other systems define another effect
# A kernel that was compiled in this process leads, through its compiler, to the globals of modules: caches of tensors
# that all models share.
NOT_TRAVERSED = (type, ModuleType, Kernel, str, bytes, int, float)


def supported() -> bool:
    """Whether pages can be released on this system."""
    return sys.platform == "linux"


def pages_of(tensors: Iterable[torch.Tensor]) -> list[Region]:
    """The whole pages that hold nothing but the storages of these CPU tensors, as sorted, disjoint regions."""
    merged: list[Region] = []
    for start, size in sorted(filter(None, map(_memory_of, tensors))):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], start + size)
        else:
            merged.append((start, start + size))
    page = mmap.PAGESIZE
    whole = [(-(-start // page) * page, end // page * page) for start, end in merged]
    return [(start, end) for start, end in whole if end - start >= MIN_BYTES]


def _memory_of(tensor: torch.Tensor) -> Region | None:
    """Address and size in bytes of a tensor's whole storage; None for an empty one, and on other devices."""
    if tensor.device.type != "cpu":
        return None
    if tensor.is_mkldnn:  # oneDNN's own layout, without a storage
        return torch.ops.mkldnn.data_ptr(tensor), torch.ops.mkldnn._nbytes(tensor)
    storage = tensor.untyped_storage()
    return (storage.data_ptr(), storage.nbytes()) if storage.nbytes() else None


def tensors_of(root: Any) -> Iterator[torch.Tensor]:
    """All tensors that are reachable from an object, through any references except modules, classes and kernels."""
    seen, pending = {id(root)}, [root]
    while pending:
        current = pending.pop()
        if isinstance(current, torch.Tensor):
            yield current
        if isinstance(current, FunctionType):  # its globals are the whole module, so only closure and defaults count
            referents: list[Any] = [current.__closure__, current.__defaults__]
        else:
            referents = gc.get_referents(current)
        for referent in referents:
            if not isinstance(referent, NOT_TRAVERSED) and id(referent) not in seen:
                seen.add(id(referent))
                pending.append(referent)


def disjoint(regions: Sequence[Region], others: Sequence[Region]) -> list[Region]:
    """The ``regions`` that share no byte with ``others``."""
    return [(start, end) for start, end in regions if not any(a < end and start < b for a, b in others)]


def total_bytes(regions: Sequence[Region]) -> int:
    """The sum of the regions' sizes."""
    return sum(end - start for start, end in regions)


def release_pages(regions: Sequence[Region]) -> None:
    """Release the pages to the system: they read as zeros until they are written again.

    OSError when the system refuses; earlier regions have been released then.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    for start, end in regions:
        if libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), MADV_DONTNEED):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))


class SavedPages:
    """The contents of pages in an unnamed temporary file, whose disk space is freed with this object."""

    def __init__(self, regions: Sequence[Region], folder: Path) -> None:
        """Write the contents of ``regions`` to a file in ``folder``. OSError when there is no room or writing fails."""
        self.regions = list(regions)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        needed, free = total_bytes(regions), shutil.disk_usage(folder).free
        if needed > free:
            raise OSError(f"{needed} bytes are needed in {folder}, but {free} are free")
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 (it lives as long as this object)
        for region in self.regions:
            view = _view(region)
            while view:
                view = view[self._file.write(view) or 0 :]
        os.fsync(self._file.fileno())
        os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # the page cache uses memory, too

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()

    def restore(self) -> None:
        """Read the contents back to their addresses. OSError when any of them can't be read."""
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
