"""Finds on CPU tensors what would make the host wait for a GPU, or what a CUDA graph can't have."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from .launches import opaque_launches

READS = {
    getattr(torch.Tensor, name)
    for name in ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "__array__")
}
# Of host values: on a GPU from pageable memory, which waits. torch.from_numpy is seen as ``lift_fresh``.
COPIES = {torch.tensor, torch.as_tensor, torch.ops.aten.lift_fresh.default}
SHAPES = {
    "aten::nonzero", "aten::bincount", "aten::masked_select", "aten::unique_dim", "aten::_unique2", "aten::equal",
    "aten::_local_scalar_dense", "aten::repeat_interleave.Tensor", "aten::is_nonzero",
}  # fmt: skip
ON_THE_CPU = "/kernels/pool.py:check"  # reads arguments only if they are on the host


def innermost_frame() -> str:
    """``file:function:line`` of the code that called torch."""
    frame = sys._getframe(2)
    while frame.f_back is not None and ("/torch/" in frame.f_code.co_filename or __file__ == frame.f_code.co_filename):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_code.co_name}:{frame.f_lineno}"


class Found(list[str]):
    """What was found, as "operation, file:function:line"."""

    def note(self, what: str) -> None:
        where = innermost_frame()
        if ON_THE_CPU not in where:
            self.append(f"{what}, {where}")


class ReadWatch(TorchFunctionMode):
    """Notes reads of values on the host, and tensors that are made of host values."""

    def __init__(self, found: Found) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in READS or function in COPIES:
            self.found.note(getattr(function, "__name__", str(function)))
        return function(*args, **(kwargs or {}))


class ShapeWatch(TorchDispatchMode):
    """Notes operations whose result has a shape that depends on values."""

    def __init__(self, found: Found) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        overload = function._overloadname
        name = function._schema.name + (f".{overload}" if overload not in ("default", "") else "")
        is_index = function is torch.ops.aten.index.Tensor or function is torch.ops.aten.index_put_.default
        mask = is_index and any(index is not None and index.dtype == torch.bool for index in args[1])
        if name in SHAPES or mask:
            self.found.note(name)
        return function(*args, **(kwargs or {}))


def watched(function: Callable[..., Any], found: Found) -> Callable[..., Any]:
    """``function``, whose calls are watched."""

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with ReadWatch(found), ShapeWatch(found), opaque_launches():
            return function(*args, **kwargs)

    return call
