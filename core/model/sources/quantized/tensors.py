"""The tensors of a quantised folder, under the names and with the numbers that transformers expects."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from trunkline.core.errors import ModelError
from trunkline.core.model.sources import weights
from trunkline.core.model.sources.info import read_config, read_object
from trunkline.core.model.sources.quantized_tensor import QuantizedTensor
from trunkline.core.model.sources.tensor_file import StoredTensor
from trunkline.kernels.quantized.weight import QuantizedWeight

from .formats import KEY, Format, find
from .parts import Parts

PIECE = 1 << 22  # numbers that are converted at a time
# Where early releases of AutoGPTQ and AutoAWQ describe the weights, and not in config.json.
OWN_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}


class FolderTensor(QuantizedTensor):
    """The weight of a quantised layer, which is made from several tensors."""

    dtype = torch.float32

    def __init__(self, parts: Parts, form: Format) -> None:
        """ModelError for parts that don't fit together."""
        self._parts, self._form = parts, form
        self.shape = torch.Size(form.sizes(parts))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Read its numbers. ModelError when the file has changed."""
        integers = self._form.read(self._parts)
        result = torch.empty(self.shape, dtype=dtype or self.dtype)
        step = max(1, PIECE // self.shape[1])
        for first in range(0, len(result), step):
            result[first : first + step] = integers.numbers(slice(first, first + step))
        return result if device is None else result.to(device)

    def quantized(self) -> QuantizedWeight:
        """Its integers. Dequantized for layouts that the kernels don't have."""
        return self._form.read(self._parts).quantized()


def format_of(folder: str) -> Format | None:
    """The format of a folder's weights; None if they are plain. ModelError if it can't be read."""
    config = read_config(Path(folder))
    own = next((name for name in OWN_FILES if Path(folder, name).exists()), None)
    try:
        if own is None or config.get(KEY) is not None:
            return find(config)
        described = {"bits" if key == "w_bit" else key: value for key, value in read_object(Path(folder, own)).items()}
        # Without bits it is about something else.
        return find({KEY: {"quant_method": OWN_FILES[own], **described}}, own) if "bits" in described else None
    except ModelError as error:
        raise ModelError(f"{folder} can't be served: {error}") from error


def stream(folder: str, form: Format) -> Iterator[tuple[str, StoredTensor]]:
    """(name, tensor) of all tensors, with one :class:`FolderTensor` in place of the parts of each quantised layer.

    ModelError for layers that can't be read.
    """
    stored = dict(weights.stream(folder))
    ends = tuple(f".{mark}" for mark in form.marks)
    layers = {name.rpartition(".")[0]: Parts(name.rpartition(".")[0]) for name in stored if name.endswith(ends)}
    for name, tensor in stored.items():
        layer, _, part = name.rpartition(".")
        if layer in layers and part in form.parts:
            layers[layer][part] = tensor
        elif part in form.parts and part != "weight":
            # Such as AWQ's scales of an activation, by which the module would have to divide.
            raise ModelError(
                f"{folder} can't be served: {name} has no quantised weight beside it, to which it belongs."
            )
        else:
            yield name, tensor
    for layer, parts in layers.items():
        try:
            tensor = FolderTensor(parts, form)
        except ModelError as error:
            raise ModelError(f"{folder} can't be served: {error}") from error
        yield f"{layer}.weight", tensor
