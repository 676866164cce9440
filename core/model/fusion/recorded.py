"""Short passes, recorded once and replayed: all fused layers are one list of kernel launches without Python,
or one for each layer with experts.

A pass of few tokens would otherwise spend more time in Python and in waking threads, for each of its hundreds of
launches, than in the kernels.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from trunkline.core.cache.pool import KVPool
from trunkline.core.model.attention import ForwardContext, packed_layout, paged_layout
from trunkline.kernels.cpu.launches.memory import keep_alive
from trunkline.kernels.cpu.launches.recording import Recording

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

    @property
    def widest(self) -> int:
        """The largest width so far."""
        return max((width for _, width in self._made), default=0)


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

    @property
    def mlp(self) -> Any:
        """Its MLP if that is a module which can't be recorded, such as a mixture of experts; else None."""

    def compute(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, trunk: ForwardContext) -> torch.Tensor: ...
    def complete(self, x: torch.Tensor, attended: torch.Tensor, trunk: ForwardContext) -> torch.Tensor:
        """What follows attention in :meth:`compute` -> [T, H]."""

    def record_attention(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, trunk: ForwardContext, scratch: Scratch
    ) -> torch.Tensor:
        """The attention of :meth:`compute`; ``attended`` and intermediate results are in ``scratch``."""

    def record_rest(self, x: torch.Tensor, attended: torch.Tensor, trunk: ForwardContext, scratch: Scratch) -> None:
        """:meth:`complete` up to ``mlp``, in place on ``x``; intermediate results are in ``scratch``."""

    def add_kept_mlp(self, x: torch.Tensor, normed: torch.Tensor) -> None:
        """The rest with ``mlp``, whose input is ``normed`` [T, H], in place on ``x``."""


class RecordedLayers:
    """All layers, recorded once for a KV pool and replayed in every pass of at most :data:`CAPACITY` tokens.

    Decoding rows and prompts may be in a pass in any mix. A recording ends where a layer has an MLP that can't be
    recorded.
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
        self._last, self._normed = layers[-1], scratch("normed", x.shape[1])
        self._recordings: list[tuple[Recording, Layer | None]] = []  # each with the layer whose MLP follows it
        left = list(layers)
        while left:
            recording = Recording(self._recordings[-1][0] if self._recordings else None)
            kept: Layer | None = None
            with recording:
                while left and kept is None:
                    layer = left.pop(0)
                    self._attended = layer.record_attention(self.x, self.cos, self.sin, context, scratch)
                    self._all_attended = len(recording)
                    layer.record_rest(self.x, self._attended, context, scratch)
                    kept = None if layer.mlp is None else layer
            self._recordings.append((recording, kept))

    def covers(self, trunk: ForwardContext) -> bool:
        """Whether the recording fits the pass: it has the same pool and slot table."""
        return trunk.pool is self._pool() and trunk.layout.table is self.table

    def run(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, trunk: ForwardContext
    ) -> tuple[torch.Tensor, bool]:
        """``x`` [T, H], ``cos`` and ``sin`` [T, R] -> [T, H], which the next call overwrites; True if only the rows
        ``trunk.wanted`` were computed, which are the result then."""
        # A mixture of experts must see all tokens: observers count them.
        tokens, layout, wanted = len(x), trunk.layout, trunk.wanted if self._last.mlp is None else None
        rows, decodes = layout.rows, layout.decodes
        self.layout.q_start[: rows + 1] = layout.q_start
        self.layout.kv_len[:rows] = layout.kv_len
        self.layout.table_row[:rows] = layout.table_row
        self.layout.out_slots[:tokens] = layout.out_slots
        self._prompts[: rows - decodes] = np.arange(decodes, rows)
        self.x[:tokens], self.cos[:tokens], self.sin[:tokens] = x, cos, sin
        for number, (recording, kept) in enumerate(self._recordings, 1):
            end = self._all_attended if wanted is not None and number == len(self._recordings) else None
            recording.run(tokens, decodes, rows - decodes, end)
            if kept is not None:
                kept.add_kept_mlp(self.x[:tokens], self._normed[:tokens])
        if wanted is None:
            return self.x[:tokens], False
        return self._last.complete(self.x[wanted], self._attended[wanted], trunk), True


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
        replayed, picked = recorded.run(x, cos, sin, ForwardContext(layout, pool, backend, wanted))
        if not (replayed - (expected[wanted] if picked else expected)).abs().max() <= bound:
            return False
    return True
