"""Keys and values of the KV pool as int8 (``--kv-cache-dtype int8``): a scale for each token and head.

One head's key, in a row of bytes; of a value the same::

    numbers int8 [D], from -127 to 127 | zeros up to a multiple of 4 bytes | scale float32
"""

from __future__ import annotations

import torch

from trunkline.kernels.cpu.quantized.rows import quantize_rows_reference

SCALE_BYTES = 4


def stored_width(width: int) -> int:
    """Bytes of a key or value of ``width`` numbers, with its scale, which is aligned."""
    return -(-width // SCALE_BYTES) * SCALE_BYTES + SCALE_BYTES


def quantize(x: torch.Tensor) -> torch.Tensor:
    """``x`` [..., D] of any float dtype -> int8 [..., stored width].

    The numbers and the scale are those of :func:`.quantize_rows_reference`, for one group.
    """
    width = x.shape[-1]
    numbers, scales = quantize_rows_reference(x.reshape(-1, width), width)
    numbers, scales = numbers.to(torch.int8).view(x.shape), scales.view(*x.shape[:-1], 1)
    padding = numbers.new_zeros(*x.shape[:-1], stored_width(width) - SCALE_BYTES - width)
    return torch.cat([numbers, padding, scales.view(torch.int8)], dim=-1)


def dequantize(stored: torch.Tensor, width: int) -> torch.Tensor:
    """The counterpart of :func:`quantize`: int8 [..., stored width] -> float32 [..., width], each a rounded product."""
    scale = stored[..., -SCALE_BYTES:].contiguous().view(torch.float32)
    return stored[..., :width].float() * scale
