"""Checkpoint tensors from safetensors files; no other format, because the others run code."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ModelError

if TYPE_CHECKING:
    from .tensor_file import StoredTensor

INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def files(folder: str | Path) -> list[Path]:
    """The checkpoint's safetensors files: those of the index, else all in the folder.

    Raises ModelError when there are none, one is missing, or the index leads out of the folder.
    """
    folder = Path(folder)
    index = folder / INDEX
    if index.is_file():
        names = sorted(set(_weight_map(index).values()))
        paths = [folder / name for name in names]
        if strange := [name for name in names if Path(name).name != name]:
            raise ModelError(f"{index} names {strange[0]!r}; shards must be plain file names in the same folder.")
        if missing := [path.name for path in paths if not path.is_file()]:
            raise ModelError(
                f"{folder} is incomplete: {INDEX} lists {missing[0]}, which isn't there. Download it again."
            )
        return paths
    single = folder / "model.safetensors"
    paths = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    if not paths:
        raise ModelError(_why_none(folder))
    return paths


def absent(folder: str | Path) -> bool:
    """Is there no file of weights at all, in whatever format?"""
    patterns = ("*.safetensors", INDEX, "*.gguf", *PICKLES)
    return not any(True for pattern in patterns for _ in Path(folder).glob(pattern))


def stream(folder: str | Path) -> Iterator[tuple[str, StoredTensor]]:
    """Name and tensor of everything in the checkpoint; the data is read when a tensor is indexed."""
    from .tensor_file import stored_tensors

    for path in files(folder):
        yield from stored_tensors(path).items()


def _weight_map(index: Path) -> dict[str, str]:
    try:
        content: dict[str, Any] = json.loads(index.read_text(encoding="utf-8"))
        return {str(key): str(value) for key, value in content["weight_map"].items()}
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(f"{index} is not a safetensors index ({error}). Download it again.") from error


def _why_none(folder: Path) -> str:
    pickles = [path.name for pattern in PICKLES for path in sorted(folder.glob(pattern))]
    if pickles:
        return (
            f"{folder} holds weights only as {pickles[0]}, a pickle, which can run code when it is opened. "
            "Convert it once where you trust it: AutoModel….from_pretrained(folder).save_pretrained(new_folder) "
            "writes safetensors."
        )
    if gguf := sorted(folder.glob("*.gguf")):
        return (
            f"{folder} holds weights only as {gguf[0].name}. Convert it once: "
            f"AutoModel….from_pretrained(folder, gguf_file={gguf[0].name!r}).save_pretrained(new_folder)."
        )
    return f"{folder} has no *.safetensors file, so there are no weights to load."
