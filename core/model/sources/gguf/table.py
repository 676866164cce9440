"""The table of a GGUF file's tensors, which is made once and read at each start."""

from __future__ import annotations

from pathlib import Path

from msgspec import Struct

TABLE = "gguf.json"  # in the folder that is prepared


class TensorPlace(Struct, omit_defaults=True):
    """A tensor in the file. ``order``: its rows, in the order in which transformers expects them; [] for the same."""

    type: str  # gguf.GGMLQuantizationType
    shape: tuple[int, ...]
    at: int  # offset of the first byte
    bytes: int
    order: list[int] = []


class Table(Struct):
    """``file``: its path when it was prepared. ``identity``: its size and the time of its last change."""

    file: str
    identity: tuple[int, int]
    tensors: dict[str, TensorPlace]  # by transformers' names


def identity_of(file: Path) -> tuple[int, int]:
    """The size in bytes and the time of the last change in ns."""
    status = file.stat()
    return status.st_size, status.st_mtime_ns
