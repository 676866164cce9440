"""Expert statistics in the engine: one recorder per model, and the controls that start, stop, dump and read it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import torch

from trunkline.core.errors import RequestError
from trunkline.core.types import ExpertLayers, Model, PassRow

from .dump import write
from .records import Ints, Pass, records_for
from .schemas import Snapshot
from .settings import MoeStatsSettings

log = logging.getLogger("trunkline.moe_stats")


class Recorder:
    """Counts to which experts the tokens of requests are sent; an ExpertObserver.

    Every computed token of any task counts once per layer. Tokens of cached prefixes aren't computed, so they aren't
    counted; nor are health probes and warm-up.
    """

    def __init__(self, name: str, layers: ExpertLayers, settings: MoeStatsSettings) -> None:
        self.name = name
        self.active = settings.enable_expert_distribution_metrics
        self._layers = layers
        self._settings = settings
        self._number = 0
        self._rows: list[PassRow] = []
        self._counted: list[bool] = []  # for each row, whether it is a client's request
        self._shown: dict[int, torch.Tensor] = {}  # layer -> the experts of each token in this pass
        self.clear()

    def clear(self) -> None:
        """Clear the record."""
        layers, settings = self._layers, self._settings
        self._passes = self._tokens = self._top_k = 0
        self._total: Ints = np.zeros((layers.depth, layers.experts), np.int64)
        self._records = records_for(
            settings.expert_distribution_recorder_mode,
            layers.depth,
            layers.experts,
            settings.expert_record_bytes,
            settings.expert_distribution_recorder_buffer_size,
        )

    # -- a pass ------------------------------------------------------------------------------

    def begin_pass(self, rows: Sequence[PassRow]) -> None:
        self._rows = list(rows)
        self._counted = [row.request.key >= 0 for row in rows]
        self._shown = {}

    def observe(self, layer: int, chosen: torch.Tensor) -> None:
        self._shown[layer] = chosen

    def end_pass(self) -> None:
        shown, self._shown = self._shown, {}
        if not any(self._counted):
            return
        chosen: Ints = torch.stack([shown[layer] for layer in self._layers.layers]).numpy()
        lengths = [row.end - row.start for row in self._rows]
        if chosen.shape[1] != sum(lengths):
            raise RuntimeError(f"{chosen.shape[1]} tokens were routed in a pass of {sum(lengths)}")
        if not all(self._counted):
            chosen = chosen[:, np.repeat(self._counted, lengths)]
        if self._top_k not in (0, chosen.shape[2]):
            log.warning("%s: tokens choose %d experts now; what was recorded is dropped", self.name, chosen.shape[2])
            self.clear()
        counts = self._count(chosen)
        rows = [row for row, counted in zip(self._rows, self._counted, strict=True) if counted]
        self._number += 1
        self._passes += 1
        self._tokens += chosen.shape[1]
        self._top_k = chosen.shape[2]
        self._total += counts
        self._records.add(Pass(self._number, rows, self._layers.layers, chosen, counts))

    def _count(self, chosen: Ints) -> Ints:
        """int64 ``[L, T, k]`` -> ``[depth, experts]``."""
        experts = self._layers.experts
        shift = np.asarray(self._layers.layers, np.int64)[:, None, None] * experts
        counts = np.bincount((chosen + shift).ravel(), minlength=self._layers.depth * experts)
        return counts.reshape(self._layers.depth, experts)

    # -- controls ----------------------------------------------------------------------------

    def start(self) -> None:
        """Clear the record and record from the next pass on."""
        if self.active:
            log.warning("%s: recording was on already; what was recorded is dropped", self.name)
        self.clear()
        self.active = True

    def stop(self) -> None:
        """Stop recording; the record is kept."""
        if not self.active:
            log.warning("%s: nothing is being recorded; /start_expert_distribution_record begins", self.name)
        self.active = False

    def dump(self) -> Snapshot:
        """Write the record to a file, then clear it. RequestError 500, and it isn't cleared, when writing fails."""
        file = write(self._records.contents(), self._settings.expert_dump_dir, per_rank=self._records.per_rank)
        snapshot = msgspec.structs.replace(self.snapshot(), file=str(file))
        log.info("%s: expert choices of %d passes written to %s", self.name, self._passes, file)
        self.clear()
        return snapshot

    def snapshot(self) -> Snapshot:
        """The record so far."""
        layers = self._layers
        return Snapshot(
            model=self.name,
            mode=self._settings.expert_distribution_recorder_mode,
            recording=self.active,
            passes=self._passes,
            tokens=self._tokens,
            top_k=self._top_k,
            depth=layers.depth,
            experts=layers.experts,
            layers=list(layers.layers),
            counts=self._total[list(layers.layers)].tolist(),
            unrecorded=self._records.refused,
        )


def recorder_of(model: Model) -> Recorder:
    """The model's recorder. RequestError 400 with the reason when there is none."""
    layers = model.expert_layers
    if layers is None:
        raise RequestError(
            f"{model.name} is not a MoE model (mixture of experts), so it has no expert distribution; "
            "?model=NAME asks about another model that is served.",
            param="model",
        )
    if layers.unseen:
        raise RequestError(f"The expert choices of {model.name} can't be recorded. {layers.unseen}", param="model")
    recorder = next(observer for observer in model.expert_observers if isinstance(observer, Recorder))
    recorder.name = model.name  # weight updates rename models
    return recorder


def start(model: Model) -> Any:
    """Control: start recording. Returns the snapshot as builtin types."""
    recorder = recorder_of(model)
    recorder.start()
    return msgspec.to_builtins(recorder.snapshot())


def stop(model: Model) -> Any:
    """Control: stop recording. Returns the snapshot."""
    recorder = recorder_of(model)
    recorder.stop()
    return msgspec.to_builtins(recorder.snapshot())


def dump(model: Model) -> Any:
    """Control: write the record to a file and clear it. Returns the snapshot of the dumped record."""
    return msgspec.to_builtins(recorder_of(model).dump())


def look(model: Model) -> Any:
    """Control: return the snapshot; changes nothing."""
    return msgspec.to_builtins(recorder_of(model).snapshot())
