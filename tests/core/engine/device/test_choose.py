"""The setting ``--device``, and what an error of the device does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from trunkline.core import Engine
from trunkline.core.engine.device import choose as module
from trunkline.core.engine.device.base import Device
from trunkline.core.engine.device.choose import choose_device
from trunkline.core.engine.device.cpu import CpuDevice
from trunkline.core.errors import EngineDown, ModelError
from trunkline.plugins.generation.schemas import GenerationParams


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Give the machine a number of GPUs; a device is its index and options."""

    def give(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(module, "CudaDevice", lambda index, **options: (index, options))

    return give


def test_names(gpus: Callable[[int], None]) -> None:
    gpus(2)
    options = {"overlaps": False, "graph_rows": 8}
    chosen: list[Any] = [choose_device(name, **options) for name in ("auto", "cuda", "cuda:0", "cuda:1")]
    assert chosen == [(0, options), (0, options), (0, options), (1, options)]
    assert isinstance(choose_device("cpu"), CpuDevice)
    gpus(0)
    assert isinstance(choose_device("auto"), CpuDevice)


@pytest.mark.parametrize(
    ("name", "count", "message"),
    [
        ("cuda", 0, "--device cuda: torch .* can't use this GPU; it finds none, or is a build for CPUs"),
        ("cuda:2", 2, "--device cuda:2: torch .* can't use this GPU; it finds 2, numbered from 0"),
        ("gpu", 1, "--device gpu: choose auto, cpu, cuda or cuda:INDEX"),
        ("cuda:", 1, "--device cuda:: choose auto"),
    ],
)
def test_what_is_not_there(name: str, count: int, message: str, gpus: Callable[[int], None]) -> None:
    gpus(count)
    with pytest.raises(ModelError, match=message):
        choose_device(name)


def test_memory_of_the_cpu() -> None:
    memory = CpuDevice().memory()
    assert 0 < memory.available <= memory.total


@pytest.mark.parametrize("broken", [False, True])
def test_an_error_of_the_device_ends_the_engine(
    broken: bool, zoo: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any other error of a pass ends its requests alone, after they were computed once more."""
    engine = Engine(str(zoo("llama")), dtype="float32", threads=1)
    runner = engine.client.transport.loop.lanes[0].runner

    def fails(*_: Any) -> Any:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(runner, "_forward", fails)
    monkeypatch.setattr(Device, "broken_by", lambda self, error: broken)
    ticket = engine.submit("generation", [5, 6, 7], GenerationParams(max_new_tokens=2))
    with pytest.raises(EngineDown if broken else Exception, match=r"failed inside|engine") as caught:
        ticket.result(30)
    assert isinstance(caught.value, EngineDown) == broken
    engine.close()
