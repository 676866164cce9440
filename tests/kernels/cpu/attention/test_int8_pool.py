"""Attention over an int8 pool: against plain attention in float64 over the numbers that the pool stands for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trunkline.core.model.attention import paged_layout
from trunkline.kernels.attention_decode import decode_cpu, decode_ordered, decode_reference
from trunkline.kernels.attention_extend import extend_cpu, extend_reference
from trunkline.kernels.layout import Layout
from trunkline.kernels.quantized.cache import dequantize, quantize

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
HEADS, KV_HEADS = 6, 2
KEY_DIM, VALUE_DIM = 21, 64  # of a stored key, the scale comes after padding; its copy is padded, too


class Pool:
    """Rows of ``spans`` over an int8 pool in which they are scattered, with random queries."""

    def __init__(self, spans: list[tuple[int, int]], seed: int, dtype: torch.dtype = torch.float32) -> None:
        noise = torch.Generator().manual_seed(seed)
        longest, tokens = max(end for _, end in spans), sum(end - start for start, end in spans)
        slots = longest * len(spans)
        table = np.random.default_rng(seed).permutation(slots).astype(np.int32).reshape(len(spans), -1)
        self.layout: Layout = paged_layout(table, spans)
        self.keys = quantize(torch.randn(slots, KV_HEADS, KEY_DIM, generator=noise))
        self.values = quantize(torch.randn(slots, KV_HEADS, VALUE_DIM, generator=noise))
        self.q = torch.randn(tokens, HEADS, KEY_DIM, generator=noise).to(dtype)
        # Attention of causal layers doesn't read the new tokens' own keys and values: the pool has other numbers.
        self.k = torch.full((tokens, KV_HEADS, KEY_DIM), torch.nan, dtype=dtype)
        self.v = torch.full((tokens, KV_HEADS, VALUE_DIM), torch.nan, dtype=dtype)

    def rows(self) -> np.ndarray:
        return np.arange(self.layout.rows, dtype=np.int32)

    def decode(self, kernel: Callable[..., None], **rules: Any) -> torch.Tensor:
        out = self.q.new_zeros(len(self.q), self.q.shape[1], VALUE_DIM)
        kernel(self.q, self.keys, self.values, self.layout, self.rows(), out, scale=0.2, **rules)
        return out

    def extend(self, kernel: Callable[..., None], **rules: Any) -> torch.Tensor:
        out = self.q.new_zeros(len(self.q), self.q.shape[1], VALUE_DIM)
        kernel(self.q, self.k, self.v, self.keys, self.values, self.layout, self.rows(), out, scale=0.2, **rules)
        return out

    def expected(self, **rules: Any) -> torch.Tensor:
        """In float64, by the references, over a pool that isn't int8."""
        q, keys, values = (
            x.double() for x in (self.q, dequantize(self.keys, KEY_DIM), dequantize(self.values, VALUE_DIM))
        )
        out = q.new_zeros(len(q), q.shape[1], VALUE_DIM)
        k, v = (x[self.layout.out_slots] for x in (keys, values))
        extend_reference(q, k, v, keys, values, self.layout, self.rows(), out, scale=0.2, **rules)
        return out


def rules_of(draw: Any) -> dict[str, Any]:
    return {
        "window": draw(st.just(0) | st.integers(1, 100)),
        "chunk": draw(st.just(0) | st.integers(1, 100)),
        "softcap": draw(st.sampled_from([0.0, 3.0])),
        "sinks": torch.linspace(-3, 4, HEADS) if draw(st.booleans()) else None,
    }


@settings(max_examples=25, deadline=None)
@given(data=st.data(), seed=st.integers(0, 99), dtype=st.sampled_from(list(TOLERANCE)))
def test_rows_with_one_query(data: Any, seed: int, dtype: torch.dtype) -> None:
    ends = data.draw(st.lists(st.integers(2, 90) | st.integers(200, 300), min_size=1, max_size=5))
    pool, rules = Pool([(end - 1, end) for end in ends], seed, dtype), rules_of(data.draw)
    expected = pool.expected(**rules)
    for kernel in (decode_cpu, decode_ordered, decode_reference):
        found = pool.decode(kernel, **rules)
        torch.testing.assert_close(found.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@settings(max_examples=25, deadline=None)
@given(data=st.data(), seed=st.integers(0, 99), dtype=st.sampled_from(list(TOLERANCE)))
def test_prompts(data: Any, seed: int, dtype: torch.dtype) -> None:
    """With or without a cached prefix."""
    starts = data.draw(st.lists(st.just(0) | st.integers(1, 200), min_size=1, max_size=4))
    spans = [(start, start + data.draw(st.integers(1, 150))) for start in starts]
    pool, rules = Pool(spans, seed, dtype), rules_of(data.draw)
    expected = pool.expected(**rules)
    for kernel in (extend_cpu, extend_reference):
        found = pool.extend(kernel, **rules)
        torch.testing.assert_close(found.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_deterministic_kernels_agree_in_every_bit(dtype: torch.dtype) -> None:
    """One query over 299 keys, alone, and as the last of a prompt of 99 or of 299 tokens."""
    last = []
    for start in (0, 200, 298):
        pool = Pool([(start, 299)], 3, dtype)
        single = Pool([(298, 299)], 3, dtype)
        pool.q[-1] = single.q[0]
        last.append(pool.extend(extend_cpu)[-1])
        assert torch.equal(last[-1], last[0])
        assert torch.equal(single.decode(decode_ordered)[0], last[0])
