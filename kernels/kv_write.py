"""Write new keys and values into their slots of the KV pool."""

from __future__ import annotations

import torch


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
    write_reference(k, v, keys, values, out_slots)
