"""Write new keys and values into their slots of the KV pool."""

from __future__ import annotations

import torch

from trunkline.kernels.cpu import kv_write as compiled


def write_reference(
    k: torch.Tensor, v: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, out_slots: torch.Tensor
) -> None:
    """``keys[out_slots[t]] = k[t]``, likewise values.

    ``k`` [T, KV, D] and ``v`` [T, KV, Dv] may be strided views; ``keys`` [slots, KV, D] and
    ``values`` [slots, KV, Dv] are one layer of the pool; ``out_slots`` int64 [T], all different.
    """
    keys[out_slots] = k.to(keys.dtype)
    values[out_slots] = v.to(values.dtype)


def write_cpu(
    k: torch.Tensor, v: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, out_slots: torch.Tensor
) -> None:
    """The same by one compiled call for keys and values: two indexed stores cost more than a small batch's data."""
    if k.dtype != keys.dtype or v.dtype != values.dtype or keys.element_size() not in (2, 4):
        write_reference(k, v, keys, values, out_slots)
        return
    k = k if k.stride(2) == 1 else k.contiguous()
    v = v if v.stride(2) == 1 else v.contiguous()
    compiled.write(k, v, keys, values, out_slots)
