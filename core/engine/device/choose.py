"""Which device the engine computes on: the setting ``--device``."""

from __future__ import annotations

import re

import torch

from trunkline.core.errors import ModelError

from .base import Device
from .cpu import CpuDevice
from .cuda import CudaDevice

AUTO = "auto"
NAME = re.compile(r"auto|cpu|cuda(:\d+)?")


def choose_device(name: str = AUTO, *, overlaps: bool = True, graph_rows: int = 0) -> Device:
    """The device ``name``: "cpu", "cuda" (the first GPU), "cuda:1" or "auto", the first GPU or else the CPU.

    ``overlaps`` and ``graph_rows`` as in :class:`Device`; a CPU has neither. ModelError where this machine, or the
    torch that is installed, doesn't have the device.
    """
    if not NAME.fullmatch(name):
        raise ModelError(f"--device {name}: choose auto, cpu, cuda or cuda:INDEX.")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (name == AUTO and not count):
        return CpuDevice()
    index = int(name.partition(":")[2] or 0)
    if index >= count:
        found = f"it finds {count}, numbered from 0" if count else "it finds none, or is a build for CPUs"
        raise ModelError(f"--device {name}: torch {torch.__version__} can't use this GPU; {found}.")
    return CudaDevice(index, overlaps=overlaps, graph_rows=graph_rows)
