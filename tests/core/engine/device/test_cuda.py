"""``CudaDevice`` on a stand-in for ``torch.cuda``: the order of copies, events and streams, and their device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from trunkline.core.engine.device import cuda
from trunkline.core.engine.device.cuda import CudaDevice


class Event:
    def __init__(self, log: list[str], name: str) -> None:
        self.log, self.name = log, name

    def synchronize(self) -> None:
        self.log.append(f"host waits for {self.name}")


class Stream:
    def __init__(self, stand_in: StandIn, name: str) -> None:
        self.stand_in, self.log, self.name = stand_in, stand_in.log, name

    def record_event(self) -> Event:
        self.stand_in.events += 1
        event = Event(self.log, f"event {self.stand_in.events}")
        self.log.append(f"{self.name}: {event.name}")
        return event

    def wait_event(self, event: Event) -> None:
        self.log.append(f"{self.name} waits for {event.name}")

    def wait_stream(self, other: Stream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")


class StandIn:
    """``torch``, whose only GPU has index 1; tensors are on the CPU. ``log``: what was done, and on which stream."""

    OutOfMemoryError, AcceleratorError = torch.OutOfMemoryError, torch.AcceleratorError
    uint8, device, Tensor = torch.uint8, torch.device, torch.Tensor

    def __init__(self) -> None:
        self.log: list[str] = []
        self.events = self.streams = 0
        self.main = self.current = Stream(self, "main")
        self.cuda = self

    def empty(self, *size: Any, dtype: torch.dtype, pin_memory: bool) -> torch.Tensor:
        assert pin_memory
        return Tensor.of(torch.empty(*size, dtype=dtype), self)

    def set_device(self, device: torch.device) -> None:
        self.log.append(f"current device {device}")

    def Stream(self, device: torch.device) -> Stream:
        assert device == torch.device("cuda:1")
        self.streams += 1
        return Stream(self, f"stream {self.streams}")

    def current_stream(self, device: torch.device) -> Stream:
        assert device == torch.device("cuda:1")
        return self.current

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        self.current, before = stream, self.current
        yield
        self.current = before

    @contextmanager
    def graph(self, graph: Any, *, pool: Any, stream: Stream) -> Iterator[None]:
        assert pool == (7, 7)
        self.log.append(f"capture on {stream.name}")
        with self.stream(stream):
            yield
        self.log.append("capture ends")

    def graph_pool_handle(self) -> tuple[int, int]:
        return 7, 7

    def CUDAGraph(self) -> str:
        return "graph"

    def mem_get_info(self, device: torch.device) -> tuple[int, int]:
        return 30, 100

    def memory_reserved(self, device: torch.device) -> int:
        return 50

    def memory_allocated(self, device: torch.device) -> int:
        return 35


class Tensor(torch.Tensor):
    """Logs copies, with their stream."""

    stand_in: StandIn

    @classmethod
    def of(cls, tensor: torch.Tensor, stand_in: StandIn) -> Tensor:
        made = tensor.as_subclass(cls)
        made.stand_in = stand_in
        return made

    def to(self, device: Any, *, non_blocking: bool) -> Any:  # type: ignore[override]
        assert (device, non_blocking) == (torch.device("cuda:1"), True)
        self.stand_in.log.append(f"{self.stand_in.current.name}: copy to the device")
        return self.as_subclass(torch.Tensor).clone()

    def copy_(self, source: Any, *, non_blocking: bool = False) -> Any:  # type: ignore[override]
        self.stand_in.log.append(f"{self.stand_in.current.name}: copy to the host, non_blocking={non_blocking}")
        return self.as_subclass(torch.Tensor).copy_(source)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    torch_of_device = StandIn()
    monkeypatch.setattr(cuda, "torch", torch_of_device)
    return torch_of_device


def test_an_upload_is_one_copy_in_the_order_of_the_work(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    device = CudaDevice(1)
    assert stand_in.log == ["current device cuda:1"]
    stand_in.log.clear()
    slices: list[torch.Tensor] = []
    # A slice of the staging buffer is what is copied: give it the buffer's log.
    copy = device.copy_to_device
    monkeypatch.setattr(
        device, "copy_to_device", lambda staged: (slices.append(staged), copy(Tensor.of(staged, stand_in)))[1]
    )
    arrays = {"a": np.arange(5), "b": np.array([[1.5, 2.5]], np.float32)}
    for _ in range(4):
        tensors = device.upload(arrays)
        assert {name: tensor.tolist() for name, tensor in tensors.items()} == {"a": [0, 1, 2, 3, 4], "b": [[1.5, 2.5]]}
    one = ["main: copy to the device", "main: event"]
    steps = [line.rstrip("0123456789 ") for line in stand_in.log]
    assert steps == [*one * 3, "host waits for event", *one], "the fourth uses the first buffer again"
    assert stand_in.log[6] == "host waits for event 1"


def test_results_are_copied_beside_the_next_pass(stand_in: StandIn) -> None:
    device = CudaDevice(1)
    stand_in.log.clear()
    recorded: list[str] = []
    result = torch.arange(3)
    result.record_stream = lambda stream: recorded.append(stream.name)  # type: ignore[method-assign]
    pending = device.download({"ids": result})
    assert stand_in.log == [
        "main: event 1",  # after the pass
        "stream 1 waits for event 1",
        "stream 1: copy to the host, non_blocking=True",
        "stream 1: event 2",
    ]
    assert recorded == ["stream 1"], "the tensor's memory could be used again while it is copied"
    assert pending.wait()["ids"].tolist() == [0, 1, 2]
    assert stand_in.log[-1] == "host waits for event 2"


def test_a_graph_is_warmed_up_on_the_stream_of_its_capture(stand_in: StandIn) -> None:
    device = CudaDevice(1)
    stand_in.log.clear()
    graph: Any = device.capture(lambda: stand_in.log.append(f"run on {stand_in.current.name}"))
    assert graph == "graph"
    assert stand_in.log == [
        "stream 2 waits for main",
        "run on stream 2",
        "main waits for stream 2",
        "capture on stream 2",
        "run on stream 2",
        "capture ends",
    ]
    device.capture(lambda: None)
    assert stand_in.streams == 2, "each stream has a workspace of cuBLAS"


def test_memory_that_torch_has_cached_is_available(stand_in: StandIn) -> None:
    assert CudaDevice(1).memory() == (100, 30 + 50 - 35)


def test_which_errors_break_it(stand_in: StandIn) -> None:
    device = CudaDevice(1)
    assert device.broken_by(torch.AcceleratorError("an illegal memory access was encountered"))
    assert not device.broken_by(torch.OutOfMemoryError("out of memory"))
