"""Inputs of attention kernels on a device, and their results by Triton and by the references.

Slots are scattered over the pool. What no row owns is NaN in the pool, and an impossible slot in the table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from trunkline.kernels import attention_decode as decode_reference
from trunkline.kernels import attention_extend as extend_reference
from trunkline.kernels.layout import Layout
from trunkline.kernels.triton import attention_decode, attention_extend

STALE = 2**31 - 1  # in table entries that no row owns
FOREIGN = 64  # slots of the pool that no row owns


class Heads(NamedTuple):
    """Query heads, KV heads, width of a key, width of a value."""

    queries: int
    kv: int
    width: int
    value_width: int

    @property
    def scale(self) -> float:
        return float(self.width**-0.5)

    def pair_bytes(self, dtype: torch.dtype) -> int:
        """Of a token's keys and values."""
        return self.kv * (self.width + self.value_width) * dtype.itemsize


@dataclass(frozen=True)
class Case:
    """Rows of one pass: ``q`` [T, H, D], ``k`` [T, KV, D], ``v`` [T, KV, Dv], ``keys`` and ``values`` of the pool."""

    heads: Heads
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    layout: Layout

    @classmethod
    def build(
        cls,
        heads: Heads,
        lengths: Sequence[int],
        new: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        pool_dtype: torch.dtype | None = None,
    ) -> Case:
        """Row r has ``lengths[r]`` keys, of which the last ``new[r]`` are new tokens with a query each."""
        order = np.random.default_rng(len(lengths) + sum(lengths))
        rows, tokens, owned = len(lengths), sum(new), sum(lengths)
        slots = order.permutation(owned + FOREIGN).astype(np.int32)
        table = np.full((rows + 2, max(lengths) + 3), STALE, np.int32)
        table_row = order.permutation(rows + 2)[:rows].astype(np.int32)
        ends = np.cumsum(lengths)
        for row, end, length in zip(table_row, ends, lengths, strict=True):
            table[row, :length] = slots[end - length : end]
        own = [slots[end - count : end] for end, count in zip(ends, new, strict=True)]
        out_slots = torch.from_numpy(np.concatenate(own).astype(np.int64)).to(device)
        generator = torch.Generator(device).manual_seed(owned)

        def noise(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=pool_dtype or dtype, device=device)

        keys = noise(len(slots), heads.kv, heads.width)
        values = noise(len(slots), heads.kv, heads.value_width)
        foreign = torch.from_numpy(slots[owned:].astype(np.int64)).to(device)
        keys[foreign], values[foreign] = torch.nan, torch.nan
        q = noise(tokens, heads.queries, heads.width).to(dtype)
        starts = np.cumsum([0, *new]).astype(np.int32)
        layout = Layout(starts, np.array(lengths, np.int32), table_row, table, out_slots, decodes=0)
        layout.on(device)  # now: a copy would be part of what is measured
        return cls(heads, q, keys[out_slots].to(dtype), values[out_slots].to(dtype), keys, values, layout)

    def empty(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A result in which what isn't written stays NaN."""
        shape = (len(self.q), self.heads.queries, self.heads.value_width)
        return torch.full(shape, torch.nan, dtype=dtype or self.q.dtype, device=self.q.device)

    def decode(self, out: torch.Tensor, **rules: Any) -> torch.Tensor:
        """By Triton; each row has one new token."""
        ids = np.arange(self.layout.rows, dtype=np.int32)
        attention_decode.decode(self.q, self.keys, self.values, self.layout, ids, out, scale=self.heads.scale, **rules)
        return out

    def decoded(self, **rules: Any) -> torch.Tensor:
        """By the reference, in float64."""
        out, ids = self.empty(torch.float64), np.arange(self.layout.rows, dtype=np.int32)
        decode_reference.decode_reference(
            self.q.double(), self.keys, self.values, self.layout, ids, out, scale=self.heads.scale, **rules
        )
        return out

    def extend(self, out: torch.Tensor, *, pool: bool = True, **rules: Any) -> torch.Tensor:
        """By Triton. Without ``pool``, over the new tokens' keys and values, which must be all."""
        keys, values = (self.keys, self.values) if pool else (None, None)
        ids, scale = range(self.layout.rows), self.heads.scale
        attention_extend.extend(self.q, self.k, self.v, keys, values, self.layout, ids, out, scale=scale, **rules)
        return out

    def extended(self, *, pool: bool = True, **rules: Any) -> torch.Tensor:
        """By the reference, in float64."""
        out, keys, values = self.empty(torch.float64), None, None
        if pool:
            keys, values = self.keys, self.values
        q, k, v, ids = self.q.double(), self.k.double(), self.v.double(), range(self.layout.rows)
        extend_reference.extend_reference(q, k, v, keys, values, self.layout, ids, out, scale=self.heads.scale, **rules)
        return out
