"""Attention over a pool in which everything that a row doesn't own is NaN, against the float64 references."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from trunkline.kernels import attention_decode as decode_reference
from trunkline.kernels import attention_extend as extend_reference
from trunkline.kernels.layout import Layout
from trunkline.kernels.triton import attention_decode, attention_extend

STALE = 2**31 - 1  # in table entries that no row owns: as a slot, it is outside of any pool
SCALE = 0.2
# Weights are rounded to the dtype of the values.
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}
WIDTHS = [(9, 3, 64, 64), (7, 1, 80, 48), (4, 2, 96, 96), (2, 1, 256, 32), (3, 3, 72, 20)]  # H, KV, D, Dv
RULES: list[dict[str, Any]] = [
    {},
    {"window": 7},
    {"softcap": 5.0},
    {"sinks": True},
    {"chunk": 16},
    {"window": 20, "sinks": True, "softcap": 3.0},
]
HALF = [torch.bfloat16, torch.float16]
PAIRS = list(zip([*WIDTHS, WIDTHS[0]], RULES, strict=True))  # every width and every rule once


def rules_for(rule: dict[str, Any], heads: int) -> dict[str, Any]:
    """Arguments of a launcher; ``sinks`` of a rule is True."""
    return rule | ({"sinks": torch.linspace(-1, 2, heads)} if rule.get("sinks") else {})


@dataclass
class Case:
    """Rows with ``news[r]`` new tokens of ``lens[r]``, whose slots are scattered over a pool."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    layout: Layout

    @classmethod
    def build(
        cls,
        widths: tuple[int, int, int, int],
        lens: Sequence[int],
        news: Sequence[int],
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        pool_dtype: torch.dtype | None = None,
    ) -> Case:
        """``widths``: heads, KV heads, widths of keys and of values. ``pool_dtype`` None: ``dtype``."""
        heads, kv_heads, width, value_width = widths
        generator, order = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
        rows, longest, tokens, owned = len(lens), max(lens) + 3, sum(news), sum(lens)
        free = order.permutation(owned + 9).astype(np.int32)
        table = np.full((rows + 2, longest), STALE, np.int32)
        table_row = order.permutation(rows + 2)[:rows].astype(np.int32)
        for row, slots in zip(table_row, np.split(free[:owned], np.cumsum(lens)[:-1]), strict=True):
            table[row, : len(slots)] = slots
        ends = [table[row, n - new : n] for row, n, new in zip(table_row, lens, news, strict=True)]
        out_slots = torch.from_numpy(np.concatenate(ends).astype(np.int64))

        def noise(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator).to(dtype)

        k, v = noise(tokens, kv_heads, width), noise(kv_heads, tokens, value_width).transpose(0, 1)
        keys = torch.full((len(free), kv_heads, width), torch.nan, dtype=pool_dtype or dtype)
        values = torch.full((len(free), kv_heads, value_width), torch.nan, dtype=pool_dtype or dtype)
        slots = torch.from_numpy(free[:owned].astype(np.int64))
        keys[slots] = noise(owned, kv_heads, width).to(keys.dtype)
        values[slots] = noise(owned, kv_heads, value_width).to(keys.dtype)
        keys[out_slots], values[out_slots] = k.to(keys.dtype), v.to(keys.dtype)
        q_start = np.cumsum([0, *news]).astype(np.int32)
        layout = Layout(q_start, np.array(lens, np.int32), table_row, table, out_slots, decodes=0)
        return cls(noise(heads, tokens, width).transpose(0, 1), k, v, keys, values, layout)

    def decode(self, rows: range | None = None, **rules: Any) -> torch.Tensor:
        """By Triton; what isn't written is NaN."""
        out = torch.full((len(self.q), self.q.shape[1], self.v.shape[2]), torch.nan, dtype=self.q.dtype)
        row_ids = np.array(range(self.layout.rows) if rows is None else rows, np.int32)
        attention_decode.decode(self.q, self.keys, self.values, self.layout, row_ids, out, scale=SCALE, **rules)
        return out

    def decoded(self, **rules: Any) -> torch.Tensor:
        """By the reference, float64."""
        out = torch.empty(len(self.q), self.q.shape[1], self.v.shape[2], dtype=torch.float64)
        row_ids = np.arange(self.layout.rows)
        decode_reference.decode_reference(
            self.q.double(), self.keys, self.values, self.layout, row_ids, out, scale=SCALE, **rules
        )
        return out

    def extend(self, *, pool: bool = True, rows: range | None = None, **rules: Any) -> torch.Tensor:
        """By Triton; what isn't written is NaN. Without ``pool``, over the packed keys and values."""
        out = torch.full((len(self.q), self.q.shape[1], self.v.shape[2]), torch.nan, dtype=self.q.dtype)
        kv = (self.keys, self.values) if pool else (None, None)
        row_ids = range(self.layout.rows) if rows is None else rows
        attention_extend.extend(self.q, self.k, self.v, *kv, self.layout, row_ids, out, scale=SCALE, **rules)
        return out

    def extended(self, *, pool: bool = True, **rules: Any) -> torch.Tensor:
        """By the reference, float64."""
        out = torch.empty(len(self.q), self.q.shape[1], self.v.shape[2], dtype=torch.float64)
        q, k, v = self.q.double(), self.k.double(), self.v.double()
        kv = (self.keys.double(), self.values.double()) if pool else (None, None)
        extend_reference.extend_reference(q, k, v, *kv, self.layout, range(self.layout.rows), out, scale=SCALE, **rules)
        return out


def assert_close(result: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = TOLERANCES[result.dtype]
    torch.testing.assert_close(result.double(), expected, atol=tolerance, rtol=tolerance)
