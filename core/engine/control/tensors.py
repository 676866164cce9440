"""Tensors that a client sent as a safetensors file, and their merge with the checkpoint of the served model."""

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
    """A file that stays readable as long as this object exists, even if its name is deleted."""

    def __init__(self, path: Path) -> None:
        with open_regular(path) as file:
            self._descriptor = os.dup(file.fileno())
        self.path = Path(f"/dev/fd/{self._descriptor}")

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)


def read_sent(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file by name. They keep the file open, so that its name may be deleted.

    ModelError when it is no valid safetensors file, or has no tensors.
    """
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
    """The tensors that the model was loaded from (``stored``), with those that were ``sent`` in their place.

    ``whole``: the transformers model. Names are the checkpoint's, with or without transformers' ``base_model_prefix``.
    The name of a tied tensor means the tensor that it is tied to. ModelError for any other name, and for a tensor that
    was sent twice.
    """
    prefix = f"{whole.base_model_prefix}."
    tied: Mapping[str, str] = getattr(whole, "all_tied_weights_keys", None) or {}
    merged: Tensors = dict(stored)
    sent_as: dict[str, str] = {}  # name in the checkpoint -> name that was sent
    for name, tensor in sent.items():
        spellings = [name, tied.get(name, name)]
        spellings += [variant for each in spellings for variant in (each.removeprefix(prefix), prefix + each)]
        stored_name = next((spelling for spelling in spellings if spelling in stored), None)
        if stored_name is None:
            raise ModelError(
                f"{name} is none of the checkpoint's tensors; use the names in its safetensors files, and .weight "
                "for the layers that are quantised there"
            )
        if stored_name in sent_as and name in tied:
            continue  # the tensor that it is tied to was sent, too
        if stored_name in sent_as and sent_as[stored_name] not in tied:
            raise ModelError(f"{name} and {sent_as[stored_name]} are the same tensor; send one")
        sent_as[stored_name] = name
        merged[stored_name] = tensor
    return merged
