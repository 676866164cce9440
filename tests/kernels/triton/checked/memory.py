"""The tensors of a launch. A pointer knows which tensor it comes from, so that no access through it reaches another.

A kernel doesn't get a tensor's address but that address with the number of its region in the upper bits:

    63      56 55                                    0
    | region | address (48 bits used, room for offsets) |

Pointer arithmetic keeps the region. Region 0 stands for real addresses, which a kernel reads from memory (a table of
pointers): they may be in any tensor that the launch or the context knows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .errors import KernelBug
from .floats import Array

_SHIFT = np.uint64(56)
_ADDRESS = np.uint64((1 << 56) - 1)
_REGIONS = 127  # so that a pointer that is cast to int64 is positive


@dataclass(frozen=True, slots=True)
class Region:
    """The memory of one tensor: bytes [start, stop). ``steps``: (stride in bytes, size) from large to small."""

    name: str
    start: int
    stop: int
    itemsize: int
    steps: tuple[tuple[int, int], ...]
    holes: bool  # bytes between start and stop that belong to no element

    @classmethod
    def of(cls, name: str, tensor: torch.Tensor) -> Region:
        item = tensor.element_size()
        dims = [
            (step * item, size) for step, size in zip(tensor.stride(), tensor.shape, strict=True) if step and size > 1
        ]
        steps = tuple(sorted(dims, reverse=True))
        span = item + sum(step * (size - 1) for step, size in steps) if tensor.numel() else 0
        # Elements that overlap (as_strided) are only checked against the whole span.
        inner = [*steps[1:], (item, 1)]
        nested = all(step >= below * size for (step, _), (below, size) in zip(steps, inner, strict=False))
        elements = int(np.prod([size for _, size in steps])) if span else 0
        start = tensor.data_ptr()
        return cls(name, start, start + span, item, steps, nested and elements * item < span)

    def check(self, offsets: Array, size: int, action: str) -> None:
        """Raise KernelBug unless all accesses of ``size`` bytes at these byte offsets are inside of elements."""
        span = self.stop - self.start
        low, high = int(offsets.min()), int(offsets.max())
        if low < 0 or high + size > span:
            at = low if low < 0 else high
            raise KernelBug(
                "bounds",
                f"{action} of {size} bytes at byte {at} of {self.name!r}, which has {span} bytes"
                f" ({span // self.itemsize} elements)",
            )
        if not self.holes:
            return
        rest = offsets
        bad = np.zeros(offsets.shape, bool)
        for step, count in self.steps:
            bad |= rest // step >= count
            rest = rest % step
        bad |= rest + size > self.itemsize
        if bad.any():
            at = int(offsets[bad][0])
            raise KernelBug("bounds", f"{action} at byte {at} of the view {self.name!r}, between its elements")


class LaunchMemory:
    """The regions of one launch."""

    def __init__(self, bounds: bool, known: tuple[torch.Tensor, ...]) -> None:
        self._bounds = bounds
        self._regions: list[Region] = []
        self._known = [Region.of(f"allowed tensor {i}", tensor) for i, tensor in enumerate(known)]

    def add(self, name: str, tensor: Any) -> int:
        """Register an argument and return the pointer that the kernel gets."""
        base = tensor if isinstance(tensor, torch.Tensor) else tensor.base  # triton.reinterpret wraps a tensor
        if base.device.type != "cpu":
            raise ValueError(f"the checked interpreter takes tensors on the CPU; {name!r} is on {base.device}")
        if len(self._regions) == _REGIONS:
            raise ValueError(f"the checked interpreter takes at most {_REGIONS} tensors")
        self._regions.append(Region.of(name, base))
        return base.data_ptr() + (len(self._regions) << int(_SHIFT))

    def resolve(self, pointers: Array, mask: Array, size: int, action: str) -> tuple[Array, Array]:
        """Real addresses for ``pointers``, and those of them that ``mask`` selects. Raises KernelBug."""
        real = pointers & _ADDRESS
        if mask.shape != pointers.shape:
            mask = np.broadcast_to(mask, pointers.shape)
        used = real[mask]
        if not used.size or not self._bounds:
            return real, used
        owners = (pointers >> _SHIFT)[mask]
        if (owners == owners[0]).all():
            groups = [(int(owners[0]), used)]
        else:
            groups = [(owner, used[owners == owner]) for owner in np.unique(owners).tolist()]
        for owner, addresses in groups:
            region = self._region(owner, addresses, action)
            region.check(addresses.view(np.int64) - region.start, size, action)
        if (used % np.uint64(size)).any():
            bad = int(used[used % np.uint64(size) != 0][0])
            raise KernelBug("alignment", f"{action} of {size} bytes at {bad:#x}")
        return real, used

    def locate(self, address: int) -> str:
        """The name and the element of a real address, for messages."""
        for region in [*self._regions, *self._known]:
            if region.start <= address < region.stop:
                return f"element {(address - region.start) // region.itemsize} of {region.name!r}"
        return f"{address:#x}"

    def _region(self, owner: int, addresses: Array, action: str) -> Region:
        if 0 < owner <= len(self._regions):
            return self._regions[owner - 1]
        low = int(addresses.min())
        for region in [*self._regions, *self._known]:
            if region.start <= low < region.stop:
                return region
        raise KernelBug("bounds", f"{action} at {low:#x}, which is in no tensor that the launch knows")
