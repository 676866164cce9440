"""NVIDIA GPUs, and AMD's, which torch gives the same names: streams, events, pinned memory and graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .base import Memory
from .staged import Copied, StagedDevice


class CudaDevice(StagedDevice):
    """Computes and uploads on one stream. Copies results on another, so that the next pass doesn't wait for them."""

    def __init__(self, index: int, *, overlaps: bool = True, graph_rows: int = 0) -> None:
        super().__init__(torch.device("cuda", index), overlaps=overlaps, graph_rows=graph_rows)
        self.enter_thread()
        self._copies = _stream(self.kind)
        self._captures = _stream(self.kind)  # one for all graphs: libraries have a workspace for each stream
        self._graph_memory: Any = torch.cuda.graph_pool_handle()

    def enter_thread(self) -> None:
        torch.cuda.set_device(self.kind)

    def pinned(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def copy_to_device(self, staged: torch.Tensor) -> Copied:
        copy = staged.to(self.kind, non_blocking=True)
        return Copied([copy], torch.cuda.current_stream(self.kind).record_event())

    def copy_to_host(self, tensors: Sequence[torch.Tensor]) -> Copied:
        computed = torch.cuda.current_stream(self.kind).record_event()
        self._copies.wait_event(computed)
        copies = []
        with torch.cuda.stream(self._copies):
            for tensor in tensors:
                copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                copies.append(copy.copy_(tensor, non_blocking=True))
                tensor.record_stream(self._copies)  # its memory isn't used again before the copy is done
            return Copied(copies, self._copies.record_event())

    def capture(self, run: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """Graphs share their memory: the results of one are overwritten when another runs."""
        current = torch.cuda.current_stream(self.kind)
        self._captures.wait_stream(current)
        with torch.cuda.stream(self._captures):
            run()  # kernels are compiled, and libraries allocate their workspaces, outside of the graph
        current.wait_stream(self._captures)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._graph_memory, stream=self._captures):
            run()
        return graph

    def memory(self) -> Memory:
        """With the memory that torch has reserved and doesn't use, as after an update of the weights."""
        free, total = torch.cuda.mem_get_info(self.kind)
        cached = torch.cuda.memory_reserved(self.kind) - torch.cuda.memory_allocated(self.kind)
        return Memory(total, free + cached)

    def broken_by(self, error: BaseException) -> bool:
        """Errors of the GPU itself, such as an illegal address. Running out of memory isn't one."""
        return isinstance(error, torch.AcceleratorError)


def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
