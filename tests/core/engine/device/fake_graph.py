"""What a CUDA graph does, on a CPU: a replay repeats torch's operations, and Triton's launches, on the very tensors of
the capture.

Whatever was a number on the host during the capture stays as it was; a host read can't be captured.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from .launches import opaque_launches
from .watch import COPIES, READS, SHAPES

Operation = tuple[Any, tuple[Any, ...], dict[str, Any], list[tuple[int, torch.Tensor]]]


class CaptureError(RuntimeError):
    """Work that a graph can't have."""


class NoReads(TorchFunctionMode):
    """Refuses reads of values on the host, and tensors that are made of host values."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in READS | COPIES:
            raise CaptureError(f"{getattr(function, '__name__', function)} reads or copies values of the host")
        return function(*args, **(kwargs or {}))


class Recorder(TorchDispatchMode):
    """Notes all operations with their tensors; the results that are new memory are those that a replay overwrites."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function._schema.name in SHAPES:
            raise CaptureError(f"{function} has a shape that depends on values")
        before = {tensor.untyped_storage().data_ptr() for tensor in tensors_in((args, kwargs))}
        result = function(*args, **kwargs)
        fresh = [
            (index, value)
            for index, value in enumerate(tree_flatten(result)[0])
            if isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() not in before
        ]
        self.operations.append((function, args, kwargs, fresh))
        return result

    def note_launch(self, launch: Callable[..., None], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A launch writes to tensors among its arguments, and makes none."""
        self.operations.append((launch, args, kwargs, []))


class FakeGraph:
    """The operations of a capture."""

    def __init__(self, operations: list[Operation], replayed: Callable[[], None]) -> None:
        self._operations = operations
        self._replayed = replayed

    @torch.inference_mode()
    def replay(self) -> None:
        for function, args, kwargs, fresh in self._operations:
            values = tree_flatten(function(*args, **kwargs))[0]
            for index, tensor in fresh:
                tensor.copy_(values[index])
        self._replayed()


def captured(run: Callable[[], None], replayed: Callable[[], None] = lambda: None) -> FakeGraph:
    """A graph of the work of ``run``, which is run once before, like on a GPU. CaptureError if there can't be one."""
    run()
    with NoReads(), Recorder() as recorder, opaque_launches(recorder.note_launch):
        run()
    return FakeGraph(recorder.operations, replayed)


def tensors_in(tree: Any) -> list[torch.Tensor]:
    return [value for value in tree_flatten(tree)[0] if isinstance(value, torch.Tensor)]
