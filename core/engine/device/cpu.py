"""The CPU: tensors share memory with the host's arrays, and all work is done when a call returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from .base import Device


@dataclass(frozen=True, slots=True)
class Completed:
    """Results that are there already."""

    tensors: dict[str, torch.Tensor]

    def wait(self) -> dict[str, torch.Tensor]:
        return self.tensors


class CpuDevice(Device):
    """Copies nothing: a pass is complete before the host changes the arrays that it has uploaded."""

    overlaps = False

    def upload(self, arrays: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def download(self, tensors: Mapping[str, torch.Tensor]) -> Completed:
        return Completed(dict(tensors))
