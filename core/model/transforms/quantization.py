"""Core's own transforms: ``--quantization``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from trunkline.core.errors import ModelError
from trunkline.core.types import Transform
from trunkline.kernels.quantized.linear import QuantizedLinear
from trunkline.kernels.quantized.weight import QuantizedWeight, quantize_int4, quantize_int8

if TYPE_CHECKING:
    import torch

Quantize = Callable[["torch.Tensor"], QuantizedWeight | None]


def transform(name: str) -> Transform:
    """The transform of ``--quantization NAME``, "int8" or "int4"."""
    # Rows lose 0.9% and weights, if they are normally distributed, 0.9% of their size in int8 and 8% in int4.
    quantize, bits, error = {"int8": (quantize_int8, 8.25, 0.02), "int4": (quantize_int4, 4.65, 0.15)}[name]
    return Transform(name, partial(_pack, name, quantize), error, bits)


def _pack(name: str, quantize: Quantize, names: Sequence[str], weight: torch.Tensor) -> QuantizedLinear | None:
    if not weight.is_cpu:
        raise ModelError(f"--quantization {name} is for CPUs; leave it out, or give --device cpu.")
    quantized = quantize(weight)
    return None if quantized is None else QuantizedLinear(quantized, weight.dtype)
