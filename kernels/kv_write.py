"""Write new keys and values into their slots of the KV pool."""

from __future__ import annotations

import torch

from trunkline.kernels.cpu import kv_write as compiled

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
    copied = k.dtype == keys.dtype and v.dtype == values.dtype and keys.element_size() in (2, 4)
    quantized = keys.dtype == torch.int8 and k.dtype == v.dtype and k.dtype in (torch.float32, torch.bfloat16)
    if not copied and not quantized:
        write_reference(k, v, keys, values, out_slots)
        return
    k = k if k.stride(2) == 1 else k.contiguous()
    v = v if v.stride(2) == 1 else v.contiguous()
    compiled.write(k, v, keys, values, out_slots)
