"""A device on which everything that overlaps with the host is as late as it may be."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from trunkline.core.engine.device.base import Device, Memory
from trunkline.core.engine.device.cpu import CpuDevice
from trunkline.core.engine.device.staged import Copied, Download, StagedDevice
from trunkline.core.engine.lane import Lane
from trunkline.core.engine.runner import Runner

from .fake_graph import FakeGraph, captured

LIVES = 3  # uploads after which the memory of an upload is used for something else


def move(lane: Lane, device: Device) -> None:
    """Run the passes of a lane without requests on another device from now on."""
    old = lane.runner
    lane.runner = Runner(old._model, old._stages, old.pool, old._table.host, device, old._experts)


@torch.inference_mode()
def poison(tensor: torch.Tensor) -> torch.Tensor:
    """Fill with values that no result has; as indices, they are out of range."""
    return tensor.fill_(False if tensor.dtype == torch.bool else -(10**6) if tensor.dtype != torch.uint8 else 0x97)


@dataclass
class LateFence:
    """Copies tensors to the host when it is waited for: what later passes do to them meanwhile is seen."""

    device: LateDevice
    number: int
    tensors: list[torch.Tensor]
    copies: list[torch.Tensor]
    lost: bool

    @torch.inference_mode()
    def synchronize(self) -> None:
        self.device.disorder += self.number < self.device.waited
        self.device.waited = self.number + 1
        if self.lost:
            self.device.failures += 1
            raise RuntimeError("the device has lost these results")
        for copy, tensor in zip(self.copies, self.tensors, strict=True):
            copy.copy_(tensor)


class Passed:
    """A fence of work that is done."""

    def synchronize(self) -> None:
        pass


class LateDevice(StagedDevice):
    """Computes on the CPU. Results are poison before they are waited for, and uploads once they are old.

    ``in_flight``: the largest number of results that were outstanding when a pass was uploaded. ``disorder``: results
    that were waited for after those of a later pass. ``fails`` decides whether results are lost, which is seen when
    they are waited for. ``replays`` counts those of graphs.
    """

    def __init__(self, *, overlaps: bool = True, graph_rows: int = 512) -> None:
        super().__init__(torch.device("cpu"), overlaps=overlaps, graph_rows=graph_rows)
        self.downloads = self.waited = self.in_flight = self.failures = self.disorder = self.replays = 0
        self.fails: Callable[[], bool] = lambda: False
        self._lost = False
        self._uploads: list[torch.Tensor] = []

    def pinned(self, size: int) -> torch.Tensor:
        return poison(torch.empty(size, dtype=torch.uint8))

    def copy_to_device(self, staged: torch.Tensor) -> Copied:
        self.in_flight = max(self.in_flight, self.downloads - self.waited)
        self._uploads.append(staged.clone())
        if len(self._uploads) > LIVES:
            poison(self._uploads.pop(0))
        return Copied([self._uploads[-1]], Passed())

    def download(self, tensors: Mapping[str, torch.Tensor]) -> Download:
        self._lost = self.fails()
        if self._lost and "next_ids" in tensors:
            tensors["next_ids"].fill_(0)  # nor can the next batch use them
        return super().download(tensors)

    def copy_to_host(self, tensors: Sequence[torch.Tensor]) -> Copied:
        copies = [poison(torch.empty_like(tensor)) for tensor in tensors]
        fence = LateFence(self, self.downloads, list(tensors), copies, self._lost)
        self.downloads += 1
        return Copied(copies, fence)

    def capture(self, run: Callable[[], None]) -> FakeGraph:
        return captured(run, self._replayed)

    def _replayed(self) -> None:
        self.replays += 1

    def memory(self) -> Memory:
        return CpuDevice().memory()
