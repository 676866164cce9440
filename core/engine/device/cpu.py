"""The CPU: tensors share memory with the host's arrays, and all work is done when a call returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import psutil
import torch

from trunkline.core.engine.resources import available_bytes

from .base import Device, Graph, Memory


@dataclass(frozen=True, slots=True)
class Completed:
    """Results that are there already."""

    tensors: dict[str, torch.Tensor]

    def wait(self) -> dict[str, torch.Tensor]:
        return self.tensors


class CpuDevice(Device):
    """Copies nothing: a pass is complete before the host changes the arrays that it has uploaded."""

    shares_memory = True

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))

    def upload(self, arrays: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def download(self, tensors: Mapping[str, torch.Tensor]) -> Completed:
        return Completed(dict(tensors))

    def capture(self, run: Callable[[], None]) -> Graph:
        raise AssertionError("a CPU has no graphs; the fused layers record their own launches")

    def memory(self) -> Memory:
        """What this process's control group leaves of the machine's memory."""
        return Memory(psutil.virtual_memory().total, available_bytes())
