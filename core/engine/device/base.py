"""``Device``: the one place that knows where tensors are, and how values get from the host to there and back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import ClassVar, NamedTuple, Protocol

import numpy as np
import torch


class Pending(Protocol):
    """Results that the device may still be computing."""

    def wait(self) -> dict[str, torch.Tensor]:
        """The results on the host, by name, when they are there."""


class Graph(Protocol):
    """The work of a function, which can be repeated."""

    def replay(self) -> None:
        """Do the work again, with the values that the tensors it reads have by then; results go to the same tensors."""


class Memory(NamedTuple):
    """Bytes of a device's memory: all of it, and what this process can still allocate."""

    total: int
    available: int


class Device(ABC):
    """Copies values to and from one device. Everything runs in the order of the calls.

    Work may run after the call that asked for it has returned: the host may change the arrays that it has uploaded,
    and must not read a result before :meth:`Pending.wait` returns it.
    """

    shares_memory: ClassVar[bool]
    """Whether the arrays of the host are on the device."""

    def __init__(self, kind: torch.device, *, overlaps: bool = False, graph_rows: int = 0) -> None:
        """``kind``: where its tensors are. ``overlaps``: whether the host prepares a batch while one is computed.

        ``graph_rows``: the largest number of rows of a graph, which saves the host the launches; 0 = no graphs.
        """
        self.kind = kind
        self.overlaps = overlaps
        self.graph_rows = graph_rows

    @abstractmethod
    def upload(self, arrays: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
        """Tensors on the device with the values, shapes and dtypes of the arrays, which are C-contiguous.

        They are the inputs of one pass: what is used in later ones must be cloned.
        """

    @abstractmethod
    def download(self, tensors: Mapping[str, torch.Tensor]) -> Pending:
        """Copy tensors to the host, after the work so far."""

    @abstractmethod
    def capture(self, run: Callable[[], None]) -> Graph:
        """A graph of the work that ``run`` gives the device. Must not be called if ``graph_rows`` is 0.

        ``run`` must not read values of tensors on the host, or have shapes that depend on them; what it computes on
        the host stays as it is in every replay. Tensors that it allocates live as long as the graph.
        """

    def enter_thread(self) -> None:
        """Called in each thread that uses the device, before it does."""
        return

    @abstractmethod
    def memory(self) -> Memory:
        """The memory in which weights and KV pools are allocated."""

    def broken_by(self, error: BaseException) -> bool:
        """Whether the device can't be used any more after an error of a pass. The engine then ends, to be restarted."""
        return False
