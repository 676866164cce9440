"""Passes of many tokens: all that is between the attention of two layers runs block by block of rows, each block on
one thread.

Each launch on its own would be divided among all threads, which wait for each other at its end, and read what others
have computed from a larger and slower cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import torch

from trunkline.core.model.attention import ForwardContext, packed_layout
from trunkline.kernels.cpu.launches.row_blocks import CAPACITY, MIN_BLOCK, RowBlocks

from .recorded import Scratch

if TYPE_CHECKING:
    from trunkline.kernels.backend import Backend
    from trunkline.kernels.linear import LinearLayer

MIN_ROWS_PER_THREAD = 24  # with fewer, the threads read the weights together in less time
# Bytes of a row of the widest intermediate result. Measured on Zen 4 with 1 MiB of L2: up to 6 KiB passes take 3 to 10%
# less time, with 32 KiB as much or more.
WIDEST = 12 << 10


class RowParallelLayer(Protocol):
    """The interface of a layer over packed rows ``x`` [T, H], ``rotary`` being what positions give to it, [T, R] each.

    Attention takes ``qkv`` [T, Q] and gives ``attended`` [T, A]; all else is computed row by row.
    """

    @property
    def recordable(self) -> bool:
        """Whether what the methods ``record_*`` do can be recorded."""

    @property
    def qkv(self) -> LinearLayer:
        """The matrix whose result is ``qkv``."""

    @property
    def out(self) -> LinearLayer:
        """The matrix whose input is ``attended``."""

    @property
    def compute(self) -> Callable[..., torch.Tensor]:
        """The whole layer, not recorded: of ``x``, ``rotary`` and the context -> [T, H]."""

    def record_qkv(
        self,
        x: torch.Tensor,
        rotary: Sequence[torch.Tensor],
        trunk: ForwardContext,
        scratch: Scratch,
        out: torch.Tensor,
    ) -> None:
        """Compute ``qkv`` into ``out``."""

    def attend(self, qkv: torch.Tensor, trunk: ForwardContext, out: torch.Tensor | None = None) -> torch.Tensor:
        """Compute ``attended``, into ``out`` if given."""

    def record_rest(self, x: torch.Tensor, attended: torch.Tensor, trunk: ForwardContext, scratch: Scratch) -> None:
        """What follows attention, in place on ``x``."""

    def complete(self, x: torch.Tensor, attended: torch.Tensor, trunk: ForwardContext) -> torch.Tensor:
        """The same, not recorded -> [T, H]."""


class RowParallelLayers:
    """The forward pass over all layers. One of :class:`.RowBlocks` runs what follows a layer's attention and what is
    before that of the next one.
    """

    def __init__(self, layers: Sequence[RowParallelLayer], like: Sequence[torch.Tensor], backend: Backend) -> None:
        """``like``: ``x`` and ``rotary`` with any number of rows, which give the widths and the dtype."""
        self._layers, self._team, dtype = layers, torch.get_num_threads(), like[0].dtype
        trunk, scratch = ForwardContext(packed_layout([1]), None, backend), Scratch(CAPACITY, dtype)
        stand_ins = Scratch(CAPACITY, dtype)
        rows, *places = (stand_ins(f"input {number}", one.shape[1]) for number, one in enumerate(like))
        self._blocks: list[RowBlocks] = []
        for former, layer in zip([None, *layers], [*layers, None], strict=True):
            attended = stand_ins("attended", (former or layers[0]).out.in_features)
            qkv = stand_ins("qkv", (layer or layers[-1]).qkv.out_features)
            blocks = RowBlocks([rows, attended, qkv, *places], self._blocks[-1] if self._blocks else None)
            with blocks:
                if former is not None:
                    former.record_rest(rows, attended, trunk, scratch)
                if layer is not None:
                    layer.record_qkv(rows, places, trunk, scratch, qkv)
            self._blocks.append(blocks)
        self.widest = scratch.widest

    def suits(self, x: torch.Tensor) -> bool:
        """Whether ``x`` [T, H] has enough rows for this to be faster."""
        return len(x) >= MIN_ROWS_PER_THREAD * self._team

    def run(self, x: torch.Tensor, rotary: Sequence[torch.Tensor], trunk: ForwardContext) -> torch.Tensor:
        """``x`` [T, H], which is overwritten, and ``rotary`` [T, R] each, all contiguous -> the hidden rows [T, H], or
        those of ``trunk.wanted``.
        """
        buffers: dict[tuple[str, int], torch.Tensor] = {}

        def buffer(name: str, width: int) -> torch.Tensor:
            if (name, width) not in buffers:
                buffers[name, width] = x.new_empty(len(x), width)
            return buffers[name, width]

        layers = self._layers
        attended, qkv = buffer("attended", layers[0].out.in_features), buffer("qkv", layers[0].qkv.out_features)
        self._blocks[0].run(x, attended, qkv, *rotary)
        for number, layer in enumerate(layers):
            attended = layer.attend(qkv, trunk, buffer("attended", layer.out.in_features))
            if number + 1 < len(layers):
                qkv = buffer("qkv", layers[number + 1].qkv.out_features)
            elif trunk.wanted is not None:
                return layer.complete(x[trunk.wanted], attended[trunk.wanted], trunk)
            self._blocks[number + 1].run(x, attended, qkv, *rotary)
        return x


def row_parallel(
    layers: Sequence[RowParallelLayer], like: Sequence[torch.Tensor], backend: Backend
) -> RowParallelLayers | None:
    """:class:`RowParallelLayers` of these; None if they don't support the layers, wouldn't be faster, or don't give the
    same bits as the layers one by one, on random inputs.
    """
    if backend.name != "cpu" or not all(layer.recordable for layer in layers):
        return None
    found = RowParallelLayers(layers, like, backend)
    if found.widest * like[0].itemsize > WIDEST:
        return None
    # Each thread gets blocks of two sizes, large enough for all variants of the kernels.
    lengths, noise = (9, 3 * torch.get_num_threads() * MIN_BLOCK), torch.Generator().manual_seed(5)
    x, *rotary = (torch.randn(sum(lengths), one.shape[1], generator=noise).to(one.dtype) for one in like)
    expected = x
    for layer in layers:
        expected = layer.compute(expected, *rotary, ForwardContext(packed_layout(lengths), None, backend))
    for wanted in (None, torch.tensor([0, 8, 12])):
        result = found.run(x.clone(), rotary, ForwardContext(packed_layout(lengths), None, backend, wanted))
        if not torch.equal(result, expected if wanted is None else expected[wanted]):
            return None
    return found
