"""A device on which everything that overlaps with the host is as late as it may be."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch

from trunkline.core.engine.device.base import Device

STAGING = 3  # uploads after which a staging buffer is used again


class LateResults:
    """Results that are there after ``wait``."""

    def __init__(self, device: LateDevice, tensors: Mapping[str, torch.Tensor]) -> None:
        self._device = device
        self._number = device.downloads
        self._values = {name: tensor.clone() for name, tensor in tensors.items()}
        self._lost = device.fails()
        if self._lost and "next_ids" in tensors:
            tensors["next_ids"].fill_(0)  # nor can the next batch use them
        device.downloads += 1

    def wait(self) -> dict[str, torch.Tensor]:
        self._device.disorder += self._number < self._device.waited
        self._device.waited = self._number + 1
        if self._lost:
            self._device.failures += 1
            raise RuntimeError("the device has lost these results")
        return self._values


class LateDevice(Device):
    """Computes on the CPU. Uploaded tensors lie in staging buffers, which later uploads overwrite.

    ``in_flight``: the largest number of results that were outstanding when a pass was uploaded. ``disorder``: results
    that were waited for after those of a later pass. ``fails`` decides
    whether results are lost, which is seen when they are waited for.
    """

    overlaps = True

    def __init__(self) -> None:
        self.downloads = self.waited = self.in_flight = self.failures = self.disorder = 0
        self.fails: Callable[[], bool] = lambda: False
        self._staging: list[list[torch.Tensor]] = []

    def upload(self, arrays: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
        self.in_flight = max(self.in_flight, self.downloads - self.waited)
        tensors = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
        self._staging.append(list(tensors.values()))
        if len(self._staging) > STAGING:
            for tensor in self._staging.pop(0):
                tensor.fill_(False if tensor.dtype == torch.bool else -(10**6))
        return tensors

    def download(self, tensors: Mapping[str, torch.Tensor]) -> LateResults:
        return LateResults(self, tensors)
