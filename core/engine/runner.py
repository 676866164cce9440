"""``Runner``: runs the model once over the rows of a pass, and gives each stage the hidden rows that it needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from trunkline.core.cache.pool import KVPool, SlotTable
from trunkline.core.model.expert_watch import ExpertWatch
from trunkline.core.types import Launched, Part, PartRow
from trunkline.kernels.layout import Layout

from .device.base import Device, Pending
from .packing import pack
from .scheduling.row import Row


class Forward(Protocol):
    """The part of a loaded model that the runner uses."""

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


@dataclass(slots=True)
class PassInFlight:
    """A pass that the device may still be computing."""

    parts: list[Part]
    results: list[Pending]  # one for each part
    next_ids: list[tuple[Part, torch.Tensor]]  # on the device: of the parts that decode, an id for each row

    def wait(self) -> list[tuple[Part, dict[str, torch.Tensor]]]:
        """Each part with its stage's tensors on the host, when they are there."""
        return [(part, result.wait()) for part, result in zip(self.parts, self.results, strict=True)]


class Runner:
    """Runs the forward passes of one model."""

    def __init__(
        self,
        model: Forward,
        stages: Mapping[str, Launcher],
        pool: KVPool | None,
        table: SlotTable,
        device: Device,
        experts: ExpertWatch | None = None,
    ) -> None:
        self._model = model
        self._stages = stages
        self.pool = pool
        self.table = table
        self.device = device
        self._experts = experts

    @torch.inference_mode()
    def start(self, rows: Sequence[Row], sources: torch.Tensor | None = None) -> PassInFlight:
        """Start one pass. It has a part for each task that needs hidden rows.

        ``sources``: the ids, int64 ``[N]``, of which rows with a ``source`` take theirs.
        """
        if self._experts is None:
            return self._start(rows, sources)
        with self._experts.watching(rows):
            return self._start(rows, sources)

    def _start(self, rows: Sequence[Row], sources: torch.Tensor | None) -> PassInFlight:
        parts = split_by_task(rows)
        for part, _ in parts:
            self._stages[part.task].prepare(part)
        packed = pack(rows, self.table, self._model.length_boundaries, token_types=self._model.token_types)
        indices = [index for _, part_indices in parts for index in part_indices]
        if indices != list(range(packed.tokens)):
            packed.arrays["wanted"] = np.array(indices, np.int64)
        for part, _ in parts:
            packed.arrays |= {f"{part.task}/{name}": array for name, array in part.arrays.items()}
        inputs = self.device.upload(packed.arrays)
        if sources is not None and "awaited" in inputs:
            inputs["ids"][inputs["awaited"]] = sources[inputs["sources"]]
        hidden = self._forward(packed.layout(inputs["slots"]), inputs)
        hidden_of_parts = torch.split(hidden, [len(part_indices) for _, part_indices in parts])
        flight = PassInFlight([part for part, _ in parts], [], [])
        for (part, _), part_hidden in zip(parts, hidden_of_parts, strict=True):
            part.tensors = {name: inputs[f"{part.task}/{name}"] for name in part.arrays}
            launched = self._stages[part.task].launch(part, part_hidden)
            tensors = dict(launched.tensors)
            if launched.next_ids is not None:
                tensors["next_ids"] = launched.next_ids
                flight.next_ids.append((part, launched.next_ids))
            flight.results.append(self.device.download(tensors))
        return flight

    def _forward(self, layout: Layout, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Hidden rows of the tokens that the stages need."""
        embeds = (inputs["embed_indices"], inputs["embeds"]) if "embeds" in inputs else None
        return self._model.forward(
            inputs["ids"],
            inputs["positions"],
            layout,
            self.pool,
            inputs.get("token_types"),
            inputs.get("wanted"),
            inputs.get("lengths"),
            embeds,
        )


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
