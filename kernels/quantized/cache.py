"""Keys and values of the KV pool as int8 (``--kv-cache-dtype int8``): a scale for each token and head.

One head's key, in a row of bytes; of a value the same::

    numbers int8 [D], from -127 to 127 | zeros up to a multiple of 4 bytes | scale float32
"""

from __future__ import annotations

import torch

LARGEST = 127  # of the numbers, so that they are symmetric about 0
LEAST = 1e-30  # smaller numbers are taken for zero: their reciprocal isn't finite
SCALE_BYTES = 4


def stored_width(width: int) -> int:
    """Bytes of a key or value of ``width`` numbers, with its scale, which is aligned."""
    return -(-width // SCALE_BYTES) * SCALE_BYTES + SCALE_BYTES


def quantize(x: torch.Tensor) -> torch.Tensor:
    """``x`` [..., D] of any float dtype -> int8 [..., stored width].

    The scale is the largest absolute value divided by 127; 0 if that value is below 1e-30, and NaN if a number isn't
    finite. The numbers are rounded to nearest, ties to even.
    """
    exact = x.float()
    most, finite = exact.abs().amax(-1, keepdim=True), exact.isfinite().all(-1, keepdim=True)
    used = finite & (most >= LEAST)
    inverse = torch.full_like(most, LARGEST) / most  # not 127 / most: torch multiplies that by a rounded reciprocal
    numbers = torch.where(used, torch.round(exact * torch.where(used, inverse, 0.0)), 0.0).to(torch.int8)
    scale = torch.where(used, most / LARGEST, torch.where(finite, 0.0, torch.nan))
    padding = numbers.new_zeros(*x.shape[:-1], stored_width(x.shape[-1]) - SCALE_BYTES - x.shape[-1])
    return torch.cat([numbers, padding, scale.view(torch.int8)], dim=-1)


def dequantize(stored: torch.Tensor, width: int) -> torch.Tensor:
    """The counterpart of :func:`quantize`: int8 [..., stored width] -> float32 [..., width], each a rounded product."""
    scale = stored[..., -SCALE_BYTES:].contiguous().view(torch.float32)
    return stored[..., :width].float() * scale
