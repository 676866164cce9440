"""Memory of recorded launches."""

from __future__ import annotations

import torch

from trunkline.kernels.cpu.threads import recorder


class Memory:
    """What recorded launches use beside inputs and outputs. Recordings that never run at the same time may share it."""

    def __init__(self) -> None:
        self.tensors: list[torch.Tensor] = []
        self._scratch: dict[bool, torch.Tensor] = {}

    def keep_alive(self, tensor: torch.Tensor) -> torch.Tensor:
        """Keep ``tensor`` alive as long as the recordings; returns it."""
        self.tensors.append(tensor)
        return tensor

    def scratch(self, size: int, of_threads: bool) -> torch.Tensor:
        """At least ``size`` bytes, which all launches share; another memory for that ``of_threads``."""
        found = self._scratch.get(of_threads)
        if found is None or len(found) < size:
            found = self._scratch[of_threads] = self.keep_alive(torch.empty(size, dtype=torch.uint8))
        return found


def keep_alive(tensor: torch.Tensor) -> torch.Tensor:
    """Keep scratch memory alive as long as the recording, if launches are being recorded; returns ``tensor``.

    A recorded launch uses the memory after the function that allocated it has returned.
    """
    return tensor if recorder.recording is None else recorder.recording.memory.keep_alive(tensor)


def scratch_memory(size: int, of_threads: bool = False) -> torch.Tensor:
    """Uninitialised memory for a launch, of at least ``size`` bytes (uint8).

    All launches of a recording share it, so its contents are valid until the next launch that uses some.
    ``of_threads``: each thread has a part of its own, whose contents it needs only while it computes one unit.
    """
    if recorder.recording is None:
        return torch.empty(size, dtype=torch.uint8)
    found: torch.Tensor = recorder.recording.memory.scratch(size, of_threads)
    return found
