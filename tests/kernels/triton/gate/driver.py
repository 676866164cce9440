"""A driver without a device: launches compile for a target, with the specialisation that a GPU would get."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from trunkline.kernels.triton import cost

from .rows import TARGETS


def gpu_target(name: str) -> GPUTarget:
    """triton's description of ``name``, one of TARGETS."""
    kind, _, number = name.partition("_")
    return GPUTarget("cuda", int(number), 32) if kind == "sm" else GPUTarget("hip", name, 64)


class DevicelessDriver:
    """Stands for one GPU per target: compiled kernels are cached by device number."""

    def __init__(self, target: str) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return gpu_target(self._target)

    def get_current_device(self) -> int:
        return TARGETS.index(self._target)

    @property
    def utils(self) -> Any:
        count = cost.GPUS[self._target].multiprocessors
        return SimpleNamespace(get_device_properties=lambda device: {"multiprocessor_count": count})

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def is_active(self) -> bool:
        return True


@dataclass(frozen=True, slots=True)
class Compiled:
    """A launch that was compiled: ``code`` is triton's CompiledKernel."""

    kernel: str
    code: Any


@contextmanager
def compiling_for(target: str) -> Iterator[list[Compiled]]:
    """While it lasts, launches compile for ``target`` and run nothing; the list gets each of them."""
    if os.environ.get("TRITON_INTERPRET"):
        raise RuntimeError("kernels don't compile under TRITON_INTERPRET")
    recorded: list[Compiled] = []
    run = JITFunction.run

    def record(self: Any, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> Any:
        code = run(self, *arguments, grid=grid, warmup=True, **named)
        if callable(grid):
            grid({**dict(zip(self.arg_names, arguments, strict=False)), **named})  # its errors are the launcher's
        recorded.append(Compiled(self.__name__, code))
        return code

    driver.set_active(DevicelessDriver(target))
    JITFunction.run = record
    try:
        yield recorded
    finally:
        JITFunction.run = run
