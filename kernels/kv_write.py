"""Write new keys and values into their slots of the KV pool."""

from __future__ import annotations

import torch

from trunkline.kernels.cpu import kv_write as compiled
from trunkline.kernels.cpu.quantized import cache as int8_cache

from .quantized.cache import quantize


def write_reference(
    k: torch.Tensor, v: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, out_slots: torch.Tensor
) -> None:
    """``keys[out_slots[t]] = k[t]`` and ``values[out_slots[t]] = v[t]``, in place.

    ``k`` [T, KV, D] and ``v`` [T, KV, Dv] may be strided views, and are converted to the pool's dtype.
    ``keys`` [slots, KV, D] and ``values`` [slots, KV, Dv] are one layer of the KV pool; an int8 pool has
    rows of another width, see :mod:`.quantized.cache`. ``out_slots`` int64 [T]: of tokens with the same slot
    (rows that pad a CUDA graph), any one is written.
    """
    if keys.dtype == torch.int8:
        k, v = quantize(k), quantize(v)
    keys[out_slots] = k.to(keys.dtype)
    values[out_slots] = v.to(values.dtype)


def write_cpu(
    k: torch.Tensor, v: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, out_slots: torch.Tensor
) -> None:
    """:func:`write_reference`, compiled: one call copies or quantises keys and values.

    For a small batch, torch's two indexed stores cost more than the copy itself. All tensors are on
    the CPU; ``keys`` and ``values`` are contiguous, which isn't checked. Where dtypes differ from that of a
    pool that isn't int8, or numbers aren't 2 or 4 bytes wide, :func:`write_reference` does it.
    """
    if keys.dtype == torch.int8 and k.dtype == v.dtype and k.dtype in (torch.float32, torch.bfloat16):
        int8_cache.write(_with_contiguous_heads(k), _with_contiguous_heads(v), keys, values, out_slots)
        return
    if k.dtype != keys.dtype or v.dtype != values.dtype or keys.element_size() not in (2, 4):
        write_reference(k, v, keys, values, out_slots)
        return
    compiled.write(_with_contiguous_heads(k), _with_contiguous_heads(v), keys, values, out_slots)


def _with_contiguous_heads(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(2) == 1 else x.contiguous()
