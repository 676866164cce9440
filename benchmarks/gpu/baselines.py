"""Attention by torch over keys and values that lie one after another: what the paged kernels are compared with."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from gpu.cases import Heads

Attention = Callable[[], torch.Tensor]


class Dense:
    """``rows`` of ``keys`` tokens each, the last ``queries`` of which have queries."""

    def __init__(
        self, heads: Heads, rows: int, queries: int, keys: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        def noise(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, dtype=dtype, device=device)

        self._heads, self._causal = heads, queries > 1
        self._q = noise(rows, heads.queries, queries, heads.width)
        self._k = noise(rows, heads.kv, keys, heads.width)
        self._v = noise(rows, heads.kv, keys, heads.value_width)

    def sdpa(self) -> Attention:
        """torch's choice of kernel; causal if there is more than one query."""
        return partial(self._sdpa, grouped=True)

    def flash(self) -> Attention:
        """torch's flash attention, with repeated KV heads if it doesn't take fewer of them than query heads.

        RuntimeError if torch has no such kernel for these inputs.
        """
        try:
            self._flash(grouped=True)
        except RuntimeError:
            group = self._heads.queries // self._heads.kv
            self._k, self._v = (x.repeat_interleave(group, 1) for x in (self._k, self._v))
            self._flash(grouped=False)
            return partial(self._flash, grouped=False)
        return partial(self._flash, grouped=True)

    def _flash(self, *, grouped: bool) -> torch.Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return self._sdpa(grouped=grouped)

    def _sdpa(self, *, grouped: bool) -> torch.Tensor:
        return scaled_dot_product_attention(
            self._q, self._k, self._v, is_causal=self._causal, scale=self._heads.scale, enable_gqa=grouped
        )

    def eager(self) -> torch.Tensor:
        """Scores, softmax, weighted sum: three steps with the scores in memory. A causal mask isn't applied."""
        heads = self._heads
        q = self._q.view(len(self._q), heads.kv, heads.queries // heads.kv, -1, heads.width)
        weights = (q @ self._k[:, :, None].transpose(-1, -2) * heads.scale).softmax(-1)
        return weights @ self._v[:, :, None]
