"""Keeps the integers of a GGUF file in memory, in place of the numbers that they stand for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch

from trunkline.core.model.sources.gguf.tensors import GgufTensor, stream
from trunkline.core.types import Transform
from trunkline.kernels.quantized.linear import QuantizedLinear
from trunkline.kernels.quantized.weight import stacked

ERROR = 0.03  # that of int8 rows, with a margin; the weights are the file's


def transform(folder: str) -> Transform:
    """The transform for the model in ``folder``, which was prepared from a GGUF file."""
    return Transform("gguf", partial(_pack, dict(stream(folder))), error=ERROR, optional=True)


def _pack(tensors: Mapping[str, GgufTensor], names: Sequence[str], weight: torch.Tensor) -> QuantizedLinear | None:
    """None if a tensor isn't stored as integers, several that are merged aren't of one kind, or ``weight`` has other
    numbers than the file: a client has sent them.
    """
    if not weight.is_cpu or any(name not in tensors for name in names):
        return None
    parts = [part for name in names if (part := tensors[name].quantized()) is not None]
    kinds = {(part.bits, part.group, part.zero, part.minima is None) for part in parts}
    if len(parts) < len(names) or len(kinds) > 1:
        return None
    if not torch.equal(torch.cat([tensors[name].to(dtype=weight.dtype) for name in names]), weight):
        return None
    return QuantizedLinear(stacked(parts), weight.dtype)
