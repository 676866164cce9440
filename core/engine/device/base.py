"""``Device``: the one place that knows how values get from the host to the device and back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Protocol

import numpy as np
import torch


class Pending(Protocol):
    """Results that the device may still be computing."""

    def wait(self) -> dict[str, torch.Tensor]:
        """The results on the host, by name, when they are there."""


class Device(ABC):
    """Copies values to and from one device. Everything runs in the order of the calls.

    Work may run after the call that asked for it has returned: the host may change the arrays that it has uploaded,
    and must not read a result before :meth:`Pending.wait` returns it.
    """

    overlaps: ClassVar[bool]
    """Whether work runs on after the call that asked for it has returned."""

    @abstractmethod
    def upload(self, arrays: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
        """Tensors on the device with the values, shapes and dtypes of the arrays, which are C-contiguous."""

    @abstractmethod
    def download(self, tensors: Mapping[str, torch.Tensor]) -> Pending:
        """Copy tensors to the host, after the work so far."""
