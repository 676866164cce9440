"""Keeps the integers of a quantised checkpoint in memory, in place of the numbers that they stand for."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

import torch

from trunkline.core.model.sources.quantized_tensor import Dequantized, QuantizedTensor
from trunkline.core.model.sources.tensor_file import StoredTensor
from trunkline.core.types import Transform
from trunkline.kernels.quantized.linear import QuantizedLinear
from trunkline.kernels.quantized.weight import stacked

log = logging.getLogger("trunkline.model")

ERROR = 0.03  # that of int8 rows, with a margin; the weights are the file's


def transform(name: str, tensors: Iterable[tuple[str, StoredTensor]]) -> Transform:
    """The transform for a checkpoint with these tensors, quantised as ``name``."""
    return Transform(name, _Pack(name, tensors), error=ERROR, optional=True)


class _Pack:
    """Makes layers from the integers of a checkpoint. Logs why weights have none, each reason once."""

    def __init__(self, name: str, tensors: Iterable[tuple[str, StoredTensor]]) -> None:
        self._name = name
        self._tensors = {name: one for name, one in tensors if isinstance(one, QuantizedTensor)}
        self._reasons: set[str] = set()

    def __call__(self, names: Sequence[str], weight: torch.Tensor) -> QuantizedLinear | None:
        """None for a weight without integers, or if it has other numbers than the file: a client has sent them."""
        if any(name not in self._tensors for name in names):
            return None
        try:
            if not weight.is_cpu:
                raise Dequantized("there are kernels for integers on CPUs only")
            merged = stacked([self._tensors[name].quantized() for name in names])
            numbers = torch.cat([self._tensors[name].to(dtype=weight.dtype) for name in names])
            return QuantizedLinear(merged, weight.dtype) if torch.equal(numbers, weight) else None
        except (Dequantized, ValueError) as error:
            if str(error) not in self._reasons:
                self._reasons.add(str(error))
                log.warning("%s, and maybe others, are dequantised from %s: %s", names[0], self._name, error)
            return None
