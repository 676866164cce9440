"""Tensors that were sent: a safetensors file beside the checkpoint that a model was loaded from."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from trunkline.core.errors import ModelError
from trunkline.core.model.sources.tensor_file import StoredTensor, open_regular, stored_tensors

Tensors = dict[str, torch.Tensor | StoredTensor]


class OpenFile:
    """A file that can be read as long as this object lives, whatever becomes of its name."""

    def __init__(self, path: Path) -> None:
        with open_regular(path) as file:
            self._descriptor = os.dup(file.fileno())
        self.path = Path(f"/dev/fd/{self._descriptor}")

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)


def receive(path: Path) -> dict[str, StoredTensor]:
    """A file's tensors by name; its disk space is free when they are, once its name is gone. ModelError when it is
    none."""
    file = OpenFile(path)
    try:
        tensors = stored_tensors(file.path)
    except ModelError as error:
        reason = str(error).replace(str(file.path), "the file").removesuffix(" Download it again.")
        raise ModelError(f"What was sent is no safetensors file: {reason}") from error
    for tensor in tensors.values():
        tensor.owner = file
    if not tensors:
        raise ModelError("The file that was sent has no tensors")
    return tensors


def merge(stored: Mapping[str, torch.Tensor | StoredTensor], sent: Mapping[str, StoredTensor], whole: Any) -> Tensors:
    """The tensors that the model was loaded from, but for those that were ``sent``.

    Names are the checkpoint's, with or without the prefix that classes with a head put before their base's. The
    name of a tensor that is tied to another means that one. ModelError for names that are neither.
    """
    prefix = f"{whole.base_model_prefix}."
    tied: Mapping[str, str] = getattr(whole, "all_tied_weights_keys", None) or {}
    merged: Tensors = dict(stored)
    taken: dict[str, str] = {}
    for name, tensor in sent.items():
        names = [name, tied.get(name, name)]
        names += [other for one in names for other in (one.removeprefix(prefix), prefix + one)]
        known = next((one for one in names if one in stored), None)
        if known is None:
            raise ModelError(f"{name} is none of the checkpoint's tensors; use the names in its safetensors files")
        if known in taken and name in tied:
            continue  # what it is tied to was sent, too
        if known in taken and taken[known] not in tied:
            raise ModelError(f"{name} and {taken[known]} are the same tensor; send one")
        taken[known] = name
        merged[known] = tensor
    return merged
