"""Finds a checkpoint's safetensors files and streams their tensors. Pickles aren't read, because they can run code."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trunkline.core.errors import ModelError

if TYPE_CHECKING:
    from .tensor_file import StoredTensor

SUFFIX, INDEX_SUFFIX = ".safetensors", ".safetensors.index.json"
SINGLE, INDEX = f"model{SUFFIX}", f"model{INDEX_SUFFIX}"
SHARD = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def files(folder: str | Path) -> list[Path]:
    """The checkpoint's safetensors files, by the rules of transformers' ``from_pretrained``.

    In this order: the file that config.json names as ``transformers_weights``; model.safetensors, even if there is an
    index (saving into a folder again leaves the old index); the shards in the index. Shards without an index, which
    transformers refuses, are used if their names show that the set is complete.

    ModelError when there are none, one is missing, or a name leads out of the folder.
    """
    folder = Path(folder)
    named = _named_in_config(folder)
    if named.endswith(SUFFIX):
        return _existing(folder, [named], "config.json names")
    if not named and (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if named or (folder / INDEX).is_file():
        (index,) = _existing(folder, [named or INDEX], "config.json names")
        return _existing(folder, sorted(set(_weight_map(index).values())), f"{index.name} lists")
    if shards := _complete_set(folder):
        return shards
    if (folder / SINGLE).is_symlink() or (folder / SINGLE).exists():
        return [folder / SINGLE]  # not a regular file: opening it raises the error
    raise ModelError(_why_none(folder))


def absent(folder: str | Path) -> bool:
    """Whether the folder has no file of weights in any format."""
    patterns = ("*.safetensors", INDEX, "*.gguf", *PICKLES)
    return not any(True for pattern in patterns for _ in Path(folder).glob(pattern))


def stream(folder: str | Path) -> Iterator[tuple[str, StoredTensor]]:
    """(name, tensor) of all tensors in the checkpoint; the data is read by ``StoredTensor.to``."""
    from .tensor_file import stored_tensors

    for path in files(folder):
        yield from stored_tensors(path).items()


def _named_in_config(folder: Path) -> str:
    """The file of weights, or index of shards, that config.json names; "" for none."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""  # read_config reports the error
    named = config.get("transformers_weights") if isinstance(config, dict) else None
    if named and not str(named).endswith((SUFFIX, INDEX_SUFFIX)):
        raise ModelError(f'{folder}: "transformers_weights" in config.json is {named!r}, which isn\'t safetensors.')
    return str(named or "")


def _existing(folder: Path, names: list[str], source: str) -> list[Path]:
    """The paths of these files. ModelError, with ``source`` in it, if one is missing or outside the folder."""
    if strange := [name for name in names if Path(name).is_absolute() or ".." in Path(name).parts]:
        raise ModelError(f"{folder}: {source} {strange[0]!r}, which leads out of the folder.")
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise ModelError(f"{folder} is incomplete: {source} {missing[0]}, which isn't there. Download it again.")
    return [folder / name for name in names]


def _complete_set(folder: Path) -> list[Path]:
    """The files model-00001-of-00002.safetensors and so on, if they are exactly one complete set; else []."""
    found = {path: match for path in sorted(folder.iterdir()) if (match := SHARD.fullmatch(path.name))}
    numbers = [int(match[1]) for match in found.values()]
    counts = {int(match[2]) for match in found.values()}
    return list(found) if counts == {len(found)} and numbers == list(range(1, len(found) + 1)) else []


def _weight_map(index: Path) -> dict[str, str]:
    try:
        content: dict[str, Any] = json.loads(index.read_text(encoding="utf-8"))
        return {str(key): str(value) for key, value in content["weight_map"].items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
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
    if others := sorted(path.name for path in folder.glob("*.safetensors")):
        return (
            f"{folder} has neither {SINGLE} nor {INDEX}, and nothing says that {others[0]} is the whole model. "
            f'Rename it, or set "transformers_weights": "{others[0]}" in config.json.'
        )
    return f"{folder} has no *.safetensors file, so there are no weights to load."
