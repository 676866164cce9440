"""Reads safetensors files with plain read calls.

A memory-mapped file is read by page faults: with a slow file system they block the thread that accesses it, even while
it holds the GIL, and if the file is truncated they kill the process. Read calls release the GIL, so that other threads
(such as the engine's heartbeat) can run, and fail with an error.
"""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from types import EllipsisType
from typing import Annotated

import msgspec
import torch
from msgspec import Meta, Raw, Struct

from trunkline.core.errors import ModelError

MAX_HEADER = 100_000_000  # bytes; the format's own limit
PIECE = 1 << 20  # bytes that are read at a time if the dtype is converted: they fit the CPU's cache
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}

Size = Annotated[int, Meta(ge=0)]


class _TensorHeader(Struct):
    """A tensor's entry in the header; its offsets count from the end of the header."""

    dtype: str
    shape: tuple[Size, ...]
    data_offsets: tuple[Size, Size]


class StoredTensor:
    """A tensor in a file, which is read when it is needed.

    It has the methods that transformers calls on a checkpoint's tensor: ``stored[...].to(device, dtype)`` reads it.
    """

    owner: object = None  # what must live as long as the tensor is to be read

    def __init__(self, path: Path, identity: tuple[int, ...], dtype: torch.dtype, shape: torch.Size, at: int) -> None:
        """``identity``: of the file, see :func:`file_identity`. ``at``: offset of the first byte of the data."""
        self.dtype = dtype
        self.shape = shape
        self._path = path
        self._identity = identity
        self._at = at

    def __getitem__(self, index: EllipsisType) -> StoredTensor:
        """The whole tensor (the index is ``...``); nothing is read."""
        return self

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Read it. ModelError when the file has changed since its header was read."""
        result = torch.empty(self.shape, dtype=dtype or self.dtype)
        flat = result.view(-1)
        converts = result.dtype != self.dtype
        step = PIECE // self.dtype.itemsize if converts else max(1, len(flat))
        scratch = torch.empty(step, dtype=self.dtype) if converts else flat
        with open_regular(self._path) as file:
            whole = file_identity(file) == self._identity
            for start in range(0, len(flat), step):
                piece = scratch[: min(step, len(flat) - start)]
                whole = whole and _read(file, piece.view(torch.uint8).numpy().data, self._at + start * piece.itemsize)
                if converts:
                    flat[start : start + step] = piece
        if not whole:
            raise ModelError(f"{self._path} changed while it was read. Try again when it is complete.")
        return result if device is None else result.to(device)


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file by name. ModelError when it is damaged or isn't a regular file."""
    with open_regular(path) as file:
        identity = file_identity(file)
        try:
            start = bytearray(8)
            if not _read(file, memoryview(start), 0):
                raise ValueError("it has no header")
            length = int.from_bytes(start, "little")
            if length > MAX_HEADER:
                raise ValueError(f"its header has {length} bytes")
            header = bytearray(length)
            if not _read(file, memoryview(header), 8):
                raise ValueError("its header is cut short")
            entries = msgspec.json.decode(header, type=dict[str, Raw])
            size = os.fstat(file.fileno()).st_size
            return {
                name: _stored(path, identity, msgspec.json.decode(raw, type=_TensorHeader), 8 + length, size)
                for name, raw in entries.items()
                if name != "__metadata__"
            }
        except (ValueError, msgspec.DecodeError) as error:
            raise ModelError(f"{path} is damaged ({error}). Download it again.") from error


def _stored(path: Path, identity: tuple[int, ...], entry: _TensorHeader, data: int, size: int) -> StoredTensor:
    """ValueError when the entry doesn't fit the file."""
    dtype = DTYPES.get(entry.dtype)
    if dtype is None:
        raise ValueError(f"it stores {entry.dtype}, which can't be read")
    begin, end = entry.data_offsets
    if end - begin != math.prod(entry.shape) * dtype.itemsize:
        raise ValueError(f"{end - begin} bytes are no {entry.dtype} tensor of shape {list(entry.shape)}")
    if data + end > size:
        raise ValueError(f"it has {size} bytes, {data + end} are needed")
    return StoredTensor(path, identity, dtype, torch.Size(entry.shape), data + begin)


@contextmanager
def open_regular(path: Path) -> Iterator[FileIO]:
    """Open a file for reading. ModelError if it isn't a regular file; opening a pipe or a device doesn't block."""
    try:
        with open(path, "rb", buffering=0, opener=_open_nonblocking) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ModelError(f"{path} is not a regular file.")
            yield file
    except OSError as error:
        raise ModelError(f"{path} can't be read: {error.strerror}.") from error


def _open_nonblocking(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def file_identity(file: FileIO) -> tuple[int, ...]:
    """Identifies this version of the file: device, inode, size, time of the last change."""
    found = os.fstat(file.fileno())
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _read(file: FileIO, buffer: memoryview, at: int) -> bool:
    """Fill the buffer from byte ``at`` on; False when the file ends before it is full."""
    file.seek(at)
    done = 0
    while done < len(buffer):
        count = file.readinto(buffer[done:])
        if not count:
            return False
        done += count
    return True
