"""Packs the rows of a pass one after another: the host's arrays, and the layout that attention kernels read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from trunkline.core.cache.pool import SlotTable
from trunkline.kernels.layout import Layout, LayoutTensors

from .admission.embeds import embeds_of
from .scheduling.row import Row


@dataclass(slots=True)
class PackedBatch:
    """The inputs of a pass over ``tokens`` tokens.

    ``arrays``, to be uploaded, along the packed axis: "ids", "positions" and "slots", int64 ``[T]``; the indices of
    tokens that are still "awaited" of the pass before, and their "sources" among the ids that it gives, int64 ``[A]``;
    where the model or a request needs them, "token_types" and "lengths" (of each token's sequence), int64 ``[T]``; and
    "embeds", float32 ``[N, width]``, which replace the tokens "embed_indices", int64 ``[N]``.
    """

    arrays: dict[str, np.ndarray]
    q_start: np.ndarray
    kv_len: np.ndarray
    table_row: np.ndarray
    table: np.ndarray
    decodes: int

    @property
    def tokens(self) -> int:
        return int(self.q_start[-1])

    @property
    def layout_arrays(self) -> dict[str, np.ndarray]:
        """To be uploaded, too, unless the pass is a graph, which has them in tensors of its own."""
        return {"q_start": self.q_start, "kv_len": self.kv_len, "table_row": self.table_row}

    def layout(self, inputs: Mapping[str, torch.Tensor], table: torch.Tensor) -> Layout:
        """The layout of the pass; ``inputs``: the uploaded arrays, ``table``: the slot table on the device."""
        tensors = LayoutTensors(inputs["q_start"], inputs["kv_len"], inputs["table_row"], table)
        arrays = (self.q_start, self.kv_len, self.table_row, self.table)
        return Layout(*arrays, out_slots=inputs["slots"], decodes=self.decodes, tensors=tensors)


def pack(rows: Sequence[Row], table: SlotTable, boundaries: Sequence[int], *, token_types: bool) -> PackedBatch:
    """Pack the rows of one pass. ``boundaries``: lengths beyond which a model's rotary frequencies change.

    ``token_types``: whether the model distinguishes the first and second text of a pair.
    """
    lengths = np.fromiter((row.end - row.start for row in rows), np.int32, len(rows))
    q_start = np.zeros(len(rows) + 1, np.int32)
    np.cumsum(lengths, out=q_start[1:])
    ids, positions, slots = (np.empty(int(q_start[-1]), np.int64) for _ in range(3))
    awaited = [(int(first), row.source) for row, first in zip(rows, q_start, strict=False) if row.source >= 0]
    for row, first, end in zip(rows, q_start, q_start[1:], strict=False):
        ids[first:end] = 0 if row.source >= 0 else row.request.tokens[row.start : row.end]
        positions[first:end] = np.arange(row.start, row.end)
        slots[first:end] = table.slots[row.table_row, row.start : row.end]
    arrays = {"ids": ids, "positions": positions, "slots": slots}
    if awaited:
        arrays["awaited"], arrays["sources"] = np.array(awaited, np.int64).T.copy()
    if token_types and any(row.request.second_at is not None for row in rows):
        arrays["token_types"] = _token_types(rows)
    known = [len(row.request.tokens) for row in rows]
    if boundaries and max(known) > boundaries[0]:
        arrays["lengths"] = np.repeat(np.array(known, np.int64), lengths)
    if (embeds := embeds_of(rows)) is not None:
        arrays["embed_indices"], arrays["embeds"] = embeds
    return PackedBatch(
        arrays,
        q_start,
        kv_len=np.fromiter((row.end for row in rows), np.int32, len(rows)),
        table_row=np.fromiter((row.table_row for row in rows), np.int32, len(rows)),
        table=table.slots,
        decodes=count_decodes(rows),
    )


def _token_types(rows: Sequence[Row]) -> np.ndarray:
    """int64 ``[T]``: 1 in the second text of a pair."""
    types: list[np.ndarray] = []
    for row in rows:
        second_at = row.end if row.request.second_at is None else row.request.second_at
        types.append(np.arange(row.start, row.end) >= second_at)
    return np.concatenate(types).astype(np.int64)


def count_decodes(rows: Sequence[Row]) -> int:
    """The number of rows at the start of a batch that decode: with one token, which is not of the prompt."""
    count = 0
    for row in rows:
        if row.end - row.start != 1 or row.start < row.request.prompt_len:
            break
        count += 1
    return count
