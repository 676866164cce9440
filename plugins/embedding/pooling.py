"""Pools hidden rows to one vector per sequence; a sequence may be computed in several passes.

Rows of whole sequences are pooled by the backend. If a sequence is computed in chunks, or begins with a
prompt that isn't pooled, partial sums of each chunk are kept and added up after the last one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from trunkline.core.types import Needs, Part, PartRow, sequence_starts

KERNEL_MODES = {
    "cls": "first",
    "lasttoken": "last",
    "mean": "mean",
    "mean_sqrt_len_tokens": "sqrt",
    "weightedmean": "weighted",
    "max": "max",
}

Partial = dict[str, Tensor]
"""Partial results of a chunk: mode -> float32 ``[H]``."""


class Pooler:
    """Pools by ``modes`` (sentence-transformers' names) and concatenates the results."""

    def __init__(self, modes: tuple[str, ...], operation: Callable[..., Tensor]) -> None:
        """``operation``: the backend's ``pool``."""
        self._modes, self._operation = modes, operation
        self._only_last = set(modes) == {"lasttoken"}

    def needs(self, skip: int) -> Needs:
        """The needs of a request whose first ``skip`` tokens aren't pooled.

        A cached prefix can be used only with last-token pooling, because cached tokens have no hidden rows.
        """
        return Needs() if self._only_last else Needs(rows_from=skip, reuse_up_to=0)

    def arrays(self, part: Part) -> dict[str, np.ndarray]:
        """What :meth:`pool` reads on the device: "starts" where all sequences are whole, else "last" where only last
        rows are pooled."""
        if self._only_last:
            last = [row.offset + row.end - row.first - 1 for row in part.rows if row.final]
            return {"last": np.array(last, np.int64)}
        if all(row.final and row.first == 0 for row in part.rows):
            return {"starts": sequence_starts(part)}
        return {}

    def pool(self, part: Part, hidden: Tensor, skips: Sequence[int]) -> Tensor:
        """Float32 ``[F, modes * H]`` for the F final rows; partial results of others are kept in ``request.state``."""
        if self._only_last:
            last = part.tensors["last"]
            picked = hidden if len(last) == len(hidden) else hidden[last]
            return torch.cat([picked.float()] * len(self._modes), dim=-1)
        if (starts := part.tensors.get("starts")) is not None:
            return torch.cat([self._operation(hidden, starts, KERNEL_MODES[mode]) for mode in self._modes], dim=-1)
        done = [self._chunk(row, hidden, skip) for row, skip in zip(part.rows, skips, strict=True)]
        vectors = [vector for vector in done if vector is not None]
        return torch.stack(vectors) if vectors else hidden.new_empty(0, 0, dtype=torch.float32)

    def _chunk(self, row: PartRow, hidden: Tensor, skip: int) -> Tensor | None:
        """Keep the partial result of the positions ``[first, end)``. After the last chunk, return the vector.

        It is stored under ``first``, so that a pass that is repeated after a failure counts once.
        """
        chunks: dict[int, Partial] = row.request.state
        chunks[row.first] = self._partial(hidden[row.offset : row.offset + row.end - row.first].float(), row.first)
        if not row.final:
            return None
        ordered = [chunks[first] for first in sorted(chunks)]
        return torch.cat([_join(mode, ordered, skip, row.end) for mode in self._modes])

    def _partial(self, rows: Tensor, first: int) -> Partial:
        partial: Partial = {}
        for mode in self._modes:
            if mode == "cls":
                partial[mode] = rows[0].clone()
            elif mode == "lasttoken":
                partial[mode] = rows[-1].clone()
            elif mode == "max":
                partial[mode] = rows.amax(0)
            elif mode == "weightedmean":
                weights = torch.arange(first + 1, first + 1 + len(rows), device=rows.device, dtype=torch.float32)
                partial[mode] = weights @ rows
            else:
                partial[mode] = rows.sum(0)
        return partial


def _join(mode: str, chunks: list[Partial], skip: int, end: int) -> Tensor:
    """The vector of one mode from the partial results of a sequence's chunks, pooled over positions ``[skip, end)``.

    With weighted mean, a token's weight is its position in the whole text, prompt included, counted from 1.
    """
    parts = [chunk[mode] for chunk in chunks]
    if mode == "cls":
        return parts[0]
    if mode == "lasttoken":
        return parts[-1]
    if mode == "max":
        return torch.stack(parts).amax(0)
    total = torch.stack(parts).sum(0)
    count = end - skip
    if mode == "mean":
        return total / count
    if mode == "mean_sqrt_len_tokens":
        return total / math.sqrt(count)
    return total / (count * (skip + 1 + end) / 2)
