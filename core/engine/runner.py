"""``Runner``: packs rows into tensors, runs the model once, and gives each stage the hidden rows that it needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import torch

from trunkline.core.cache.pool import KVPool, SlotTable
from trunkline.core.model.expert_watch import ExpertWatch
from trunkline.core.types import Launched, Part, PartRow
from trunkline.kernels.layout import Layout

from .batch import Row
from .embeds import embeds_of


class Forward(Protocol):
    """The part of a loaded model that the runner uses."""

    @property
    def device(self) -> torch.device: ...
    @property
    def token_types(self) -> bool:
        """Whether the model has embeddings of token types (first and second text of a pair)."""

    @property
    def length_boundaries(self) -> Sequence[int]:
        """Lengths in tokens beyond which a sequence's rotary frequencies change, sorted."""

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        layout: Layout,
        pool: KVPool | None,
        token_types: torch.Tensor | None = None,
        wanted: torch.Tensor | None = None,
        lengths: torch.Tensor | None = None,
        embeds: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Ids, positions and token types int64 ``[T]`` -> hidden rows ``[T, hidden_size]`` after the final norm.

        With ``wanted``, int64 ``[W]``, only the hidden rows of these tokens, in this order. ``lengths``
        int64 ``[T]``: the length of each token's sequence, in tokens; None if none exceeds a boundary.
        ``embeds``: int64 ``[N]``, indices of tokens, and float32 ``[N, width]``, used in place of their embeddings.
        """


class Launcher(Protocol):
    """The part of a stage that the runner uses."""

    def prepare(self, part: Part) -> None: ...
    def launch(self, part: Part, hidden: torch.Tensor) -> Launched: ...


class Runner:
    """Runs the forward passes of one model."""

    def __init__(
        self,
        model: Forward,
        stages: Mapping[str, Launcher],
        pool: KVPool | None,
        table: SlotTable,
        experts: ExpertWatch | None = None,
    ) -> None:
        self._model = model
        self._stages = stages
        self.pool = pool
        self.table = table
        self._experts = experts

    @torch.inference_mode()
    def run(self, rows: Sequence[Row]) -> list[tuple[Part, dict[str, torch.Tensor]]]:
        """Run one pass. Returns a part, and its stage's tensors on the CPU, for each task that needs hidden rows."""
        if self._experts is None:
            return self._run(rows)
        with self._experts.watching(rows):
            return self._run(rows)

    def _run(self, rows: Sequence[Row]) -> list[tuple[Part, dict[str, torch.Tensor]]]:
        parts = split_by_task(rows)
        for part, _ in parts:
            self._stages[part.task].prepare(part)
        ids, positions, layout = self._inputs(rows)
        all_indices = [index for _, indices in parts for index in indices]
        all_rows = len(all_indices) == len(ids) and all_indices == list(range(len(ids)))
        wanted = None if all_rows else torch.tensor(all_indices, dtype=torch.int64, device=self._model.device)
        hidden = self._model.forward(
            ids, positions, layout, self.pool, self._token_types(rows), wanted, self._lengths(rows), embeds_of(rows)
        )
        hidden_of_parts = torch.split(hidden, [len(indices) for _, indices in parts])
        launched = [
            (part, self._stages[part.task].launch(part, part_hidden))
            for (part, _), part_hidden in zip(parts, hidden_of_parts, strict=True)
        ]
        return [(part, to_host(result)) for part, result in launched]

    def _inputs(self, rows: Sequence[Row]) -> tuple[torch.Tensor, torch.Tensor, Layout]:
        """Token ids and positions, int64 ``[T]``, and the layout of the packed axis."""
        lengths = np.fromiter((row.end - row.start for row in rows), np.int32, len(rows))
        q_start = np.zeros(len(rows) + 1, np.int32)
        np.cumsum(lengths, out=q_start[1:])
        total = int(q_start[-1])
        ids, positions, slots = (np.empty(total, np.int64) for _ in range(3))
        for row, first, end in zip(rows, q_start, q_start[1:], strict=False):
            ids[first:end] = row.request.tokens[row.start : row.end]
            positions[first:end] = np.arange(row.start, row.end)
            slots[first:end] = self.table.slots[row.table_row, row.start : row.end]
        device = self._model.device
        layout = Layout(
            q_start=q_start,
            kv_len=np.fromiter((row.end for row in rows), np.int32, len(rows)),
            table_row=np.fromiter((row.table_row for row in rows), np.int32, len(rows)),
            table=self.table.slots,
            out_slots=torch.from_numpy(slots).to(device),
            decodes=count_decodes(rows),
        )
        return torch.from_numpy(ids).to(device), torch.from_numpy(positions).to(device), layout

    def _lengths(self, rows: Sequence[Row]) -> torch.Tensor | None:
        """The number of known tokens of each token's request, int64 ``[T]``; None if none exceeds a boundary."""
        boundaries = self._model.length_boundaries
        known = [len(row.request.tokens) for row in rows]
        if not boundaries or max(known) <= boundaries[0]:
            return None
        lengths = np.repeat(known, [row.end - row.start for row in rows])
        return torch.from_numpy(lengths).to(self._model.device)

    def _token_types(self, rows: Sequence[Row]) -> torch.Tensor | None:
        """Token types, int64 ``[T]``: 1 in the second text of a pair. None if all are 0 or the model has none."""
        if not self._model.token_types or all(row.request.second_at is None for row in rows):
            return None
        types: list[np.ndarray] = []
        for row in rows:
            second_at = row.end if row.request.second_at is None else row.request.second_at
            types.append(np.arange(row.start, row.end) >= second_at)
        return torch.from_numpy(np.concatenate(types).astype(np.int64)).to(self._model.device)


def count_decodes(rows: Sequence[Row]) -> int:
    """The number of rows at the start of a batch that decode: with one token, which is not of the prompt."""
    count = 0
    for row in rows:
        if row.end - row.start != 1 or row.start < row.request.prompt_len:
            break
        count += 1
    return count


def split_by_task(rows: Sequence[Row]) -> list[tuple[Part, list[int]]]:
    """Group rows by task: the part of each task, and the indices in the packed axis of the hidden rows that it needs.

    Tasks that need no hidden row of this pass are left out.
    """
    parts: dict[str, tuple[Part, list[int]]] = {}
    packed = 0  # index of the row's first token in the packed axis
    for row in rows:
        first = first_needed(row)
        if first < row.end:
            part, indices = parts.setdefault(row.request.task, (Part(row.request.task, []), []))
            part.rows.append(PartRow(row.request, row.start, row.end, first, len(indices), row.final))
            indices.extend(range(packed + first - row.start, packed + row.end - row.start))
        packed += row.end - row.start
    return list(parts.values())


def first_needed(row: Row) -> int:
    """The first position whose hidden row the stage needs; ``row.end`` if it needs none of this row."""
    if row.request.needs.rows_from is None:
        return row.end - 1 if row.final else row.end
    return max(row.start, row.request.needs.rows_from)


def to_host(launched: Launched) -> dict[str, torch.Tensor]:
    """Copy a launch's tensors to the CPU, by name, ``next_ids`` included. Waits for the device."""
    tensors = {name: tensor.cpu() for name, tensor in launched.tensors.items()}
    if launched.next_ids is not None:
        tensors["next_ids"] = launched.next_ids.cpu()
    return tensors
