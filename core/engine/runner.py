"""``Runner``: runs the model once over the rows of a pass, and gives each stage the hidden rows that it needs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from trunkline.core.cache.pool import KVPool, SlotTable
from trunkline.core.discovery import Provided
from trunkline.core.model.expert_watch import Choices, ExpertWatch
from trunkline.core.types import ExpertObserver, Launched, Part, PartRow
from trunkline.kernels.layout import Layout

from .device.base import Device, Pending
from .device.graphs import INPUTS, DecodeGraphs, capture_graphs, padded_sizes
from .device.table import DeviceTable
from .packing import PackedBatch, pack
from .scheduling.row import Row


class Forward(Protocol):
    """The part of a loaded model that the runner uses."""

    @property
    def token_types(self) -> bool:
        """Whether the model has embeddings of token types (first and second text of a pair)."""

    @property
    def captures(self) -> bool:
        """Whether decode-only passes can be CUDA graphs."""

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

    rows: Sequence[Row]
    parts: list[Part]
    results: list[Pending]  # one for each part
    next_ids: list[tuple[Part, torch.Tensor]]  # on the device: of the parts that decode, an id for each row
    routing: Routing | None = None

    def wait(self) -> list[tuple[Part, dict[str, torch.Tensor]]]:
        """Each part with its stage's tensors on the host, when they are there. Tells the observers of experts."""
        waited = [(part, result.wait()) for part, result in zip(self.parts, self.results, strict=True)]
        if self.routing is not None:
            self.routing.tell(self.rows)
        return waited


@dataclass(frozen=True, slots=True)
class Routing:
    """The experts of a pass, and the observers that wanted to be told of them when it was started."""

    watch: ExpertWatch
    observers: Sequence[Provided[ExpertObserver]]
    layers: list[int]
    chosen: Pending

    def tell(self, rows: Sequence[Row]) -> None:
        """Tell the observers, but for rows of requests that have ended since."""
        choices = list(zip(self.layers, self.chosen.wait().values(), strict=True))
        self.watch.tell(self.observers, rows, [row.request.schedule is not None for row in rows], choices)


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
        self.device = device
        self._table = DeviceTable(table, device, unused_slot=None if pool is None else pool.slots)
        self._experts = experts
        self._graphs: DecodeGraphs | None = None

    def for_model(self, model: Forward, stages: Mapping[str, Launcher], experts: ExpertWatch | None) -> Runner:
        """A runner of another model with the same pool and slot table, of which one runner at a time is used."""
        other = copy.copy(self)
        other._model, other._stages, other._experts, other._graphs = model, stages, experts, None
        return other

    @property
    def warm_up_steps(self) -> int:
        """How often :meth:`warm_up` calls ``step``."""
        if not self._decodes_on_device:
            return 0
        return 1 + (len(padded_sizes(self._graph_rows)) if self.device.graph_rows else 0)

    def warm_up(self, name: str, step: Callable[[], None]) -> None:
        """Run decode-only passes of the model ``name`` and :meth:`capture` graphs. ``step`` is called before each."""
        if self._decodes_on_device:
            step()
            self._passes().run_bounds()
            self.capture(name, step)

    def capture(self, name: str, step: Callable[[], None] = lambda: None) -> None:
        """Capture graphs of decode-only passes of the model ``name``, if device and model have them."""
        if self.device.graph_rows and self._decodes_on_device:
            self._graphs = capture_graphs(self._passes(), name, step)

    @property
    def _decodes_on_device(self) -> bool:
        """Whether kernels read all that differs between decode-only passes on the device."""
        return self.pool is not None and self._model.captures

    def _passes(self) -> DecodeGraphs:
        assert self.pool is not None
        return DecodeGraphs(self._model, self.pool, self._table, self.device, self._experts, rows=self._graph_rows)

    @property
    def _graph_rows(self) -> int:
        return min(len(self._table.host.slots), self.device.graph_rows)

    @torch.inference_mode()
    def start(self, rows: Sequence[Row], sources: torch.Tensor | None = None) -> PassInFlight:
        """Start one pass. It has a part for each task that needs hidden rows.

        ``sources``: the ids, int64 ``[N]``, of which rows with a ``source`` take theirs.
        """
        parts = split_by_task(rows)
        for part, _ in parts:
            self._stages[part.task].prepare(part)
        packed = pack(rows, self._table.host, self._model.length_boundaries, token_types=self._model.token_types)
        arrays = None if self._graphs is None else self._graphs.inputs_for(packed)
        if arrays is None:
            arrays = packed.arrays | packed.layout_arrays
        indices = [index for _, part_indices in parts for index in part_indices]
        if indices != list(range(packed.tokens)):
            arrays["wanted"] = np.array(indices, np.int64)
        for part, _ in parts:
            arrays |= {f"{part.task}/{name}": array for name, array in part.arrays.items()}
        inputs = self.device.upload(arrays | self._table.changes())
        self._table.update(inputs)
        if sources is not None and "awaited" in inputs:
            ids = inputs[INPUTS][0] if INPUTS in inputs else inputs["ids"]
            # -1 stands for a row whose logits weren't finite: it ends when its pass is collected.
            ids[inputs["awaited"]] = sources[inputs["sources"]].clamp(min=0)
        choices: Choices = []
        observers = () if self._experts is None else self._experts.active_observers()
        with self._experts.noting(choices) if self._experts is not None and observers else nullcontext():
            hidden = self._forward(packed, inputs)
        hidden_of_parts = torch.split(hidden, [len(part_indices) for _, part_indices in parts])
        flight = PassInFlight(rows, [part for part, _ in parts], [], [])
        for (part, _), part_hidden in zip(parts, hidden_of_parts, strict=True):
            part.tensors = {name: inputs[f"{part.task}/{name}"] for name in part.arrays}
            launched = self._stages[part.task].launch(part, part_hidden)
            tensors = dict(launched.tensors)
            if launched.next_ids is not None:
                tensors["next_ids"] = launched.next_ids
                flight.next_ids.append((part, launched.next_ids))
            flight.results.append(self.device.download(tensors))
        if self._experts is not None and observers:
            chosen = self.device.download({str(index): tensor for index, (_, tensor) in enumerate(choices)})
            flight.routing = Routing(self._experts, observers, [layer for layer, _ in choices], chosen)
        return flight

    def _forward(self, packed: PackedBatch, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Hidden rows of the tokens that the stages need."""
        if self._graphs is not None and INPUTS in inputs:
            hidden = self._graphs.run(packed.decodes, inputs)
            return hidden[inputs["wanted"]] if "wanted" in inputs else hidden
        embeds = (inputs["embed_indices"], inputs["embeds"]) if "embeds" in inputs else None
        return self._model.forward(
            inputs["ids"],
            inputs["positions"],
            packed.layout(inputs, self._table.tensor),
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
        first, stop = needed(row)
        if first < stop or row.final:
            part, indices = parts.setdefault(row.request.task, (Part(row.request.task, []), []))
            part.rows.append(PartRow(row.request, row.start, row.end, first, stop, len(indices), row.final))
            indices.extend(range(packed + first - row.start, packed + stop - row.start))
        packed += row.end - row.start
    return list(parts.values())


def needed(row: Row) -> tuple[int, int]:
    """The positions ``(first, stop)`` of the row whose hidden rows the stage needs; ``first == stop`` for none."""
    needs = row.request.needs
    if needs.rows_from is None:
        return (row.end - 1 if row.final else row.end), row.end
    first = min(max(row.start, needs.rows_from), row.end)
    stop = row.end if needs.rows_up_to is None else min(row.end, needs.rows_up_to)
    return first, max(first, stop)
