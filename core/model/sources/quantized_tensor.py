"""A tensor whose file has integers in place of its numbers."""

from __future__ import annotations

from abc import abstractmethod

from trunkline.kernels.quantized.weight import QuantizedWeight

from .tensor_file import StoredTensor


class Dequantized(Exception):
    """Why a tensor's integers can't be multiplied as they are, so that its numbers are; a sentence without a stop."""


class QuantizedTensor(StoredTensor):
    """``to`` reads its numbers; :meth:`quantized` the integers that they are made from."""

    @abstractmethod
    def quantized(self) -> QuantizedWeight:
        """The weight [N, K] with the integers of the file. Dequantized if the kernels have no such weights."""
