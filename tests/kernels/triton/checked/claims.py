"""Promises to the compiler about values: multiple_of, max_contiguous, max_constancy. Upstream never checks them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl

from .errors import KernelBug
from .floats import Array


def _groups(data: Array, axis: int, size: int) -> Array:
    """``data`` with ``axis`` last and split into groups of up to ``size``: [..., groups, size]."""
    last = np.moveaxis(data, axis, -1)
    size = min(size, last.shape[-1])
    return last.reshape(*last.shape[:-1], -1, size)


def _contiguous(data: Array, axis: int, size: int, _: int) -> bool:
    groups = _groups(data, axis, size)
    return bool((groups == groups[..., :1] + np.arange(groups.shape[-1], dtype=np.int64)).all())


def _constant(data: Array, axis: int, size: int, _: int) -> bool:
    groups = _groups(data, axis, size)
    return bool((groups == groups[..., :1]).all())


def _divisible(data: Array, axis: int, size: int, step: int) -> bool:
    """The claim is about the first value of each contiguous run along ``axis``."""
    last = np.moveaxis(data, axis, -1)
    first = np.ones(last.shape, bool)
    first[..., 1:] = last[..., 1:] != last[..., :-1] + step
    return not (last[first] % size).any()


def _checked(name: str, holds: Callable[[Array, int, int, int], bool]) -> Callable[[Any, Any], Any]:
    def claim(value: Any, sizes: Any) -> Any:
        if not isinstance(value, tl.tensor):
            return value
        listed = sizes if isinstance(sizes, list | tuple) else [sizes]
        numbers = [int(each.value if isinstance(each, tl.constexpr) else each) for each in listed]
        data, kind = value.handle.data.astype(np.int64), value.dtype
        if data.ndim < len(numbers):
            data = data.reshape(-1)
        step = max(1, kind.element_ty.primitive_bitwidth // 8) if kind.is_ptr() else 1
        for axis, size in enumerate(numbers):
            if not holds(data // step if step > 1 and holds is _contiguous else data, axis, size, step):
                raise KernelBug("claim", f"{name}(…, {numbers}) does not hold along axis {axis}: {data.ravel()[:8]} …")
        return value

    return claim


CLAIMS = {
    "multiple_of": _checked("multiple_of", _divisible),
    "max_contiguous": _checked("max_contiguous", _contiguous),
    "max_constancy": _checked("max_constancy", _constant),
}
