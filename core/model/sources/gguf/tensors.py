"""The tensors of a GGUF file: read as numbers, or as the integers that they are stored as."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import torch

from trunkline.core.errors import ModelError
from trunkline.core.model.sources.catalogue import cache_folder
from trunkline.core.model.sources.quantized_tensor import Dequantized, QuantizedTensor
from trunkline.core.model.sources.tensor_file import StoredTensor, file_identity, open_regular
from trunkline.kernels.quantized.weight import QuantizedWeight

from .blocks import READ
from .table import TABLE, Table, TensorPlace, identity_of

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
PIECE = 1 << 22  # numbers that are converted at a time


class GgufTensor(StoredTensor):
    """A tensor of a GGUF file, in the order and with the numbers that transformers expects."""

    def __init__(self, raw: StoredTensor, entry: TensorPlace) -> None:
        """``raw``: its bytes in the file."""
        self._raw, self._entry = raw, entry
        self.dtype, self.shape = FLOATS.get(entry.type, torch.float32), torch.Size(entry.shape)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Read it. ModelError when the file has changed."""
        entry, data = self._entry, self._raw.to()
        result = torch.empty(self.shape, dtype=dtype or self.dtype)
        if entry.type in FLOATS:
            result.copy_(data.view(self.dtype).view(self.shape))
        else:
            from gguf import GGMLQuantizationType, dequantize

            kind, rows = GGMLQuantizationType[entry.type], data.numpy().reshape(self.shape[0], -1)
            step = max(1, PIECE // self.shape[-1])
            for first in range(0, len(rows), step):
                result[first : first + step] = torch.from_numpy(dequantize(rows[first : first + step], kind))
        result = result[self._order]
        return result if device is None else result.to(device)

    @property
    def _order(self) -> torch.Tensor | slice:
        return torch.tensor(self._entry.order) if self._entry.order else slice(None)


class QuantizedGgufTensor(GgufTensor, QuantizedTensor):
    """A tensor of a type that isn't one of floats."""

    def quantized(self) -> QuantizedWeight:
        """The weight [N, K] with the codes of the file. Dequantized if its type has none, or it isn't a matrix."""
        entry = self._entry
        if entry.type not in READ or len(self.shape) != 2:
            raise Dequantized(f"there is no kernel for the type {entry.type}")
        outputs, inputs = self.shape
        found = READ[entry.type](self._raw.to().numpy().reshape(outputs * self._blocks_of_a_row, -1))
        codes = torch.from_numpy(found.codes).view(outputs, inputs)
        scales, minima = (
            None if one is None else torch.from_numpy(one).view(outputs, -1) for one in (found.scales, found.minima)
        )
        assert scales is not None
        factors = torch.ones(outputs)
        if entry.type.endswith("_K"):  # products of two numbers, which aren't exact in float16
            factors = scales.abs().amax(1).clamp_min(1e-30)
            scales = scales / factors[:, None]
            minima = None if minima is None else minima / factors[:, None]
        weight = QuantizedWeight(
            found.bits,
            inputs // scales.shape[1],
            codes[self._order],
            factors[self._order],
            scales.half()[self._order],
            None if minima is None else minima.half()[self._order],
            found.zero,
        )
        known = (weight.scales, weight.minima)
        if not all(one is None or bool(one.isfinite().all()) for one in known):
            raise Dequantized("its scales aren't finite")
        return weight

    @property
    def _blocks_of_a_row(self) -> int:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        return int(self.shape[-1] // GGML_QUANT_SIZES[GGMLQuantizationType[self._entry.type]][0])


def stream(folder: str) -> Iterator[tuple[str, GgufTensor]]:
    """(name, tensor) of all tensors. ModelError when the file isn't as it was when the folder was prepared."""
    table = msgspec.json.decode((Path(folder) / TABLE).read_bytes(), type=Table)
    file = Path(table.file)
    if not file.is_file() or identity_of(file) != table.identity:
        raise ModelError(f"{file} has changed or gone. Start again with the path of the GGUF file.")
    with open_regular(file) as opened:
        identity = file_identity(opened)
    for name, entry in table.tensors.items():
        kind = GgufTensor if entry.type in FLOATS else QuantizedGgufTensor
        yield name, kind(StoredTensor(file, identity, torch.uint8, torch.Size([entry.bytes]), entry.at), entry)


def is_prepared(folder: str) -> bool:
    """Whether a folder stands for a GGUF file. Only those in the cache do: a table names a file to read."""
    path = Path(folder).resolve()
    return path.parent == (cache_folder() / "gguf").resolve() and (path / TABLE).is_file()
