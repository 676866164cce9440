"""Staging buffers aren't refilled before the copy that reads them ran; results aren't read before they are there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trunkline.core.cache.pool import SlotTable
from trunkline.core.engine.device.base import Memory
from trunkline.core.engine.device.cpu import CpuDevice
from trunkline.core.engine.device.staged import ALIGNMENT, BUFFERS, Copied, Fence, StagedDevice
from trunkline.core.engine.device.table import WIDTH, DeviceTable

from .late import LateDevice

DTYPES = (np.int64, np.int32, np.float32, np.bool_)


class QueueDevice(StagedDevice):
    """Its work, copies and additions, waits in a queue until something is waited for, or :meth:`run` is called."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.queue: list[Callable[[], Any]] = []
        self.done = 0

    def give(self, work: Callable[[], Any]) -> Fence:
        self.queue.append(work)
        return Place(self, self.done + len(self.queue))

    def run(self, count: int) -> None:
        for _ in range(min(count, len(self.queue))):
            self.queue.pop(0)()
            self.done += 1

    def pinned(self, size: int) -> torch.Tensor:
        return torch.full((size,), 0x97, dtype=torch.uint8)

    def copy_to_device(self, staged: torch.Tensor) -> Copied:
        copy = torch.full_like(staged, 0x55)
        return Copied([copy], self.give(lambda: copy.copy_(staged)))

    def copy_to_host(self, tensors: Sequence[torch.Tensor]) -> Copied:
        copies = [torch.zeros_like(tensor) for tensor in tensors]
        fences = [self.give(lambda a=copy, b=tensor: a.copy_(b)) for copy, tensor in zip(copies, tensors, strict=True)]
        return Copied(copies, fences[-1])

    def capture(self, run: Callable[[], None]) -> Any:
        raise AssertionError

    def memory(self) -> Memory:
        return CpuDevice().memory()


class Place:
    """After the first ``end`` pieces of a queue's work."""

    def __init__(self, device: QueueDevice, end: int) -> None:
        self.device, self.end = device, end

    def synchronize(self) -> None:
        self.device.run(self.end - self.device.done)


def arrays_of(seed: int, size: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    shapes = [(), (size,), (2, size), (0, 3), (size * 700,)]
    return {
        f"{dtype.__name__}{index}": random.integers(0, 2, shape).astype(dtype) * random.integers(1, 99)
        for index, shape in enumerate(shapes)
        for dtype in DTYPES
    }


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 3)), min_size=1, max_size=9), st.integers(0, 99))
def check_order(device_class: type[QueueDevice], uploads: list[tuple[int, int]], seed: int) -> None:
    device = device_class()
    made = []
    for number, (size, runs) in enumerate(uploads):
        arrays = arrays_of(seed + number, size)
        expected = {name: array.copy() for name, array in arrays.items()}
        tensors = device.upload(arrays)
        for array in arrays.values():
            array.fill(0)  # the host may change what it has uploaded
        made.append((expected, tensors, device.download(tensors)))
        for tensor in tensors.values():
            device.give(lambda tensor=tensor: tensor.zero_())  # work that comes after the download
        device.run(runs)
    for expected, tensors, pending in made:
        assert all(tensor.data_ptr() % ALIGNMENT == 0 for tensor in tensors.values() if tensor.numel())
        found = pending.wait()
        for name, array in expected.items():
            assert found[name].shape == array.shape
            np.testing.assert_array_equal(found[name].numpy(), array)


def test_copies_have_the_values_of_their_time() -> None:
    check_order(QueueDevice)


class RefillsTooEarly(QueueDevice):
    """A staging buffer is filled again while the copy that reads it waits."""

    def _next_buffer(self, size: int) -> Any:
        for buffer in self._ring:
            buffer.copied = None
        return super()._next_buffer(size)


class ReadsTooEarly(QueueDevice):
    """Results are returned before they are there."""

    def copy_to_host(self, tensors: Sequence[torch.Tensor]) -> Copied:
        return super().copy_to_host(tensors)._replace(fence=Place(self, 0))


@pytest.mark.parametrize("device", [RefillsTooEarly, ReadsTooEarly])
def test_hazards_of_copies_are_caught(device: type[QueueDevice]) -> None:
    with pytest.raises(AssertionError):
        check_order(device)


def test_staging_memory_is_reused() -> None:
    """Uploads of similar size use the same buffers, and none is made while the engine serves."""
    device = QueueDevice()
    for number in range(2 * BUFFERS):
        device.upload({"a": np.full(1000 + number, number)})
        if number == BUFFERS - 1:
            buffers = {buffer.memory.data_ptr() for buffer in device._ring}
    assert {buffer.memory.data_ptr() for buffer in device._ring} == buffers
    assert device.upload({}) == {}


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 7), st.integers(1, 4), st.booleans()), max_size=12))
def test_the_table_on_the_device_follows_the_hosts(writes: list[tuple[int, int, int, bool]]) -> None:
    """Also when an upload failed, and so the changes weren't applied."""
    device, table, number = LateDevice(), SlotTable(5, 11), 100
    copy = DeviceTable(table, device, unused_slot=77)
    for row, start, count, uploaded in writes:
        table.write(row, start, np.arange(number, number + count, dtype=np.int32))
        table.write_each([row, 4 - row], [start, start + 1], np.array([number + 50, number + 51], np.int32))
        number += 100
        arrays = copy.changes()
        if uploaded:
            copy.update(device.upload(arrays))
    copy.update(device.upload(copy.changes()))
    np.testing.assert_array_equal(copy.tensor[:5, :11].numpy(), table.slots)
    assert copy.tensor.shape == (6, WIDTH)
    assert copy.tensor[5, 0] == 77
    assert copy.unused_row == 5
    assert copy.changes() == {}


def test_a_device_that_shares_memory_has_no_copy() -> None:
    table = SlotTable(2, 4)
    shared = DeviceTable(table, CpuDevice(), unused_slot=0)
    table.write(1, 2, np.array([9], np.int32))
    assert shared.changes() == {}
    assert shared.tensor[1, 2] == 9
