"""Pools hidden rows to one vector per sequence; a sequence may be computed in several passes.

Rows of whole sequences are pooled by the backend. If a sequence is computed in chunks, or begins with a
prompt that isn't pooled, each chunk continues the sums of the one before. Rows are added one after another, as the CPU
kernel adds them, so that the vector doesn't depend on the chunks.
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
"""Results of the rows up to the end of a chunk: mode -> float32 ``[H]``."""


class Pooler:
    """Pools by ``modes`` (sentence-transformers' names) and concatenates the results."""

    def __init__(self, modes: tuple[str, ...], operation: Callable[..., Tensor]) -> None:
        """``operation``: the backend's ``pool``."""
        self._modes, self._operation = modes, operation
        self._only_last, self._only_first = set(modes) == {"lasttoken"}, set(modes) == {"cls"}

    def needs(self, skip: int) -> Needs:
        """The needs of a request whose first ``skip`` tokens aren't pooled.

        A cached prefix can be used only with last-token pooling, because cached tokens have no hidden rows.
        """
        if self._only_last:
            return Needs()
        return Needs(rows_from=skip, rows_up_to=skip + 1 if self._only_first else None, reuse_up_to=0)

    def arrays(self, part: Part) -> dict[str, np.ndarray]:
        """What :meth:`pool` reads on the device: "starts" where all sequences are whole, else "last" where only last
        rows are pooled."""
        if self._only_last:
            last = [row.offset + row.stop - row.first - 1 for row in part.rows if row.final]
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
        """Keep the results of the positions ``[skip, end)``. After the last chunk, return the vector.

        They are stored under ``first``, so that a pass that is repeated after a failure counts once.
        """
        chunks: dict[int, Partial] = row.request.state
        before = chunks[max(first for first in chunks if first < row.first)] if row.first > skip else {}
        rows = hidden[row.offset : row.offset + row.stop - row.first].float()
        chunks[row.first] = {mode: _continued(mode, before.get(mode), rows, row.first) for mode in self._modes}
        if not row.final:
            return None
        return torch.cat([_finished(mode, chunks[row.first][mode], skip, row.end) for mode in self._modes])


def _continued(mode: str, before: Tensor | None, rows: Tensor, first: int) -> Tensor:
    """The result of one mode up to the end of ``rows``, which begin at the position ``first``.

    ``before``: the result of the rows before them, None if there are none. With weighted mean, a token's weight is its
    position in the whole text, a prompt that isn't pooled included, counted from 1.
    """
    if mode == "cls":
        return rows[0].clone() if before is None else before
    if mode == "lasttoken":
        return rows[-1].clone()
    if mode == "max":
        return rows.amax(0) if before is None else torch.maximum(before, rows.amax(0))
    total = torch.zeros_like(rows[0]) if before is None else before.clone()
    for number, row in enumerate(rows):
        total += row * float(first + number + 1) if mode == "weightedmean" else row
    return total


def _finished(mode: str, total: Tensor, skip: int, end: int) -> Tensor:
    """The vector of one mode, pooled over positions ``[skip, end)``, from the result of the last chunk."""
    count = end - skip
    if mode == "mean":
        return total / count
    if mode == "mean_sqrt_len_tokens":
        return total / math.sqrt(count)
    if mode == "weightedmean":
        return total / (count * (skip + 1 + end) / 2)
    return total
