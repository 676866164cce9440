"""Short passes, recorded once and replayed: all fused layers are one list of kernel launches without Python.

A pass of few tokens would otherwise spend more time in Python and in waking threads, for each of its hundreds of
launches, than in the kernels.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from trunkline.core.cache.pool import KVPool
from trunkline.core.model.attention import ForwardContext, packed_layout, paged_layout
from trunkline.kernels.cpu.recording import Recording, keep_alive

if TYPE_CHECKING:
    from trunkline.kernels.backend import Backend

CAPACITY = 256  # tokens of a pass; in larger ones, launches take less than 5% of the time


class Scratch:
    """Scratch memory that all layers share: buffers ``[rows, width]`` by name and width."""

    def __init__(self, rows: int, dtype: torch.dtype) -> None:
        self.rows, self.dtype = rows, dtype
        self._made: dict[tuple[str, int], torch.Tensor] = {}

    def __call__(self, name: str, width: int) -> torch.Tensor:
        key = name, width
        if key not in self._made:
            self._made[key] = keep_alive(torch.zeros(self.rows, width, dtype=self.dtype))
        return self._made[key]


class Layer(Protocol):
    """The interface of a decoder layer over packed rows ``x`` [T, H], with ``cos`` and ``sin`` [T, R].

    Its attention gives ``attended`` [T, A]; what follows it needs no other token, so it may run for some tokens only.
    """

    @property
    def kv_shape(self) -> tuple[int, int, int]:
        """Number of KV heads, width of a key, width of a value."""

    @property
    def recordable(self) -> bool:
        """Whether the layer can be recorded."""

    def compute(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, trunk: ForwardContext) -> torch.Tensor: ...
    def complete(self, x: torch.Tensor, attended: torch.Tensor, trunk: ForwardContext) -> torch.Tensor:
        """What follows attention in :meth:`compute` -> [T, H]."""

    def record_attention(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, trunk: ForwardContext, scratch: Scratch
    ) -> torch.Tensor:
        """The attention of :meth:`compute`; ``attended`` and intermediate results are in ``scratch``."""

    def record_rest(self, x: torch.Tensor, attended: torch.Tensor, trunk: ForwardContext, scratch: Scratch) -> None:
        """:meth:`complete`, in place on ``x``; intermediate results are in ``scratch``."""


class RecordedLayers:
    """All layers, recorded once for a KV pool and replayed in every pass of at most :data:`CAPACITY` tokens.

    Decoding rows and prompts may be in a pass in any mix.
    """

    def __init__(self, layers: Sequence[Layer], trunk: ForwardContext, x: torch.Tensor, cos: torch.Tensor) -> None:
        """Record for the pool and slot table of ``trunk``; ``x`` and ``cos`` give the widths and dtype."""
        assert trunk.pool is not None
        self._pool = weakref.ref(trunk.pool)  # the model must not keep it: its memory may be released separately
        self.table = trunk.layout.table
        self.layout = packed_layout([1] * CAPACITY)
        self.layout.table, self.layout.out_slots = self.table, torch.zeros(CAPACITY, dtype=torch.int64)
        self.layout.kv_len.fill(self.table.shape[1])  # the most: launches choose their number of threads by it
        self._prompts = np.arange(CAPACITY, dtype=np.int32)
        self.layout.split = np.arange(CAPACITY, dtype=np.int32), self._prompts  # both kernels are recorded
        scratch = Scratch(CAPACITY, x.dtype)
        self.x, self.cos, self.sin = (
            scratch(name, like.shape[1]) for name, like in (("x", x), ("cos", cos), ("sin", cos))
        )
        context = ForwardContext(self.layout, trunk.pool, trunk.backend)
        *former, self._last = layers
        self._recording = Recording()
        with self._recording:
            for layer in former:
                attended = layer.record_attention(self.x, self.cos, self.sin, context, scratch)
                layer.record_rest(self.x, attended, context, scratch)
            self._attended = self._last.record_attention(self.x, self.cos, self.sin, context, scratch)
            self._all_attended = len(self._recording)
            self._last.record_rest(self.x, self._attended, context, scratch)

    def covers(self, trunk: ForwardContext) -> bool:
        """Whether the recording fits the pass: it has the same pool and slot table."""
        return trunk.pool is self._pool() and trunk.layout.table is self.table

    def run(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, trunk: ForwardContext) -> torch.Tensor:
        """``x`` [T, H], ``cos`` and ``sin`` [T, R] -> [T, H], which the next call overwrites.

        Only the rows ``trunk.wanted``, unless that is None.
        """
        tokens, layout, wanted = len(x), trunk.layout, trunk.wanted
        rows, decodes = layout.rows, layout.decodes
        self.layout.q_start[: rows + 1] = layout.q_start
        self.layout.kv_len[:rows] = layout.kv_len
        self.layout.table_row[:rows] = layout.table_row
        self.layout.out_slots[:tokens] = layout.out_slots
        self._prompts[: rows - decodes] = np.arange(decodes, rows)
        self.x[:tokens], self.cos[:tokens], self.sin[:tokens] = x, cos, sin
        end = None if wanted is None else self._all_attended
        self._recording.run(tokens, decodes, rows - decodes, end)
        if wanted is None:
            return self.x[:tokens]
        return self._last.complete(self.x[wanted], self._attended[wanted], trunk)


def can_replay(
    layers: Sequence[Layer], hidden: int, rotary_dim: int, dtype: torch.dtype, backend: Backend, tolerance: float
) -> bool:
    """Whether :class:`RecordedLayers` supports these layers and gives the same results, on random inputs.

    ``hidden`` and ``rotary_dim``: widths of ``x`` and of cos and sin. ``tolerance``: bound of the largest
    difference, relative to the largest number.
    """
    if backend.name != "cpu" or not all(layer.recordable for layer in layers):
        return False
    cached, lengths = 5, (1, 1, 1, 4, 3)  # three decoding rows, two prompts
    table = np.arange(len(lengths) * 9, dtype=np.int32)[::-1].reshape(len(lengths), -1).copy()
    pool = KVPool([layer.kv_shape for layer in layers], table.size, dtype, torch.device("cpu"))
    noise = torch.Generator().manual_seed(3)
    for tensor in (*pool.keys, *pool.values):
        tensor.normal_(generator=noise)
    spans = [(cached, cached + length) for length in lengths]
    spans[-1] = 0, lengths[-1]  # without a cached prefix
    layout, tokens = paged_layout(table, spans), sum(lengths)
    x, cos, sin = (torch.randn(tokens, width, generator=noise).to(dtype) for width in (hidden, rotary_dim, rotary_dim))
    expected = x
    for layer in layers:
        expected = layer.compute(expected, cos, sin, ForwardContext(layout, pool, backend))
    recorded = RecordedLayers(layers, ForwardContext(layout, pool, backend), x, cos)
    bound = tolerance * expected.abs().max()
    for wanted in (None, torch.tensor([0, 2, tokens - 1])):
        replayed = recorded.run(x, cos, sin, ForwardContext(layout, pool, backend, wanted))
        if not (replayed - (expected if wanted is None else expected[wanted])).abs().max() <= bound:
            return False
    return True
