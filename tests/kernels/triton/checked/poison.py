"""Undefined values: lanes of a load that its mask leaves out and for which it names no ``other``.

A handle carries a Boolean array of its undefined elements, which operations pass on to what they compute. Only a use
that can be seen is an error: a store of such an element, an address, a mask or a branch that depends on one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import TensorHandle

from .errors import KernelBug
from .floats import Array
from .numeric import NumericBuilder

_KEY = "undefined"
Method = Callable[..., Any]

# Every element of the result depends on the elements of the operands at its place.
_ELEMENTWISE = (
    "unary_op", "cast_impl", "create_idiv", "create_umulhi", "create_bitcast", "create_int_to_ptr",
    "create_ptr_to_int", "create_ashr", "create_fma", "create_fabs", "create_rsqrt", "create_erf", "create_addptr",
    "create_fp_to_fp", "create_clampf",
)  # fmt: skip
# The result has the operand's elements at other places; what is undefined moves with them.
_MOVES = ("create_reshape", "create_trans", "create_expand_dims", "create_broadcast", "create_unsplat")


def undefined(handle: Any) -> Array | None:
    """Which elements of a handle are undefined, None when all are defined."""
    return handle.attr.get(_KEY) if isinstance(handle, TensorHandle) else None


def mark(handle: TensorHandle, lanes: Array | None) -> TensorHandle:
    """``handle`` with these elements undefined."""
    if lanes is not None and lanes.any():
        shape = handle.data.shape
        handle.attr[_KEY] = np.full(shape, lanes.any()) if lanes.size == 1 else np.broadcast_to(lanes, shape)
    return handle


def require(handle: Any, use: str, mask: Array | None = None) -> None:
    """Raise KernelBug when an element of ``handle`` (that ``mask`` selects) is undefined."""
    lanes = undefined(handle)
    if lanes is not None and (lanes if mask is None else lanes & mask).any():
        count = int((lanes if mask is None else lanes & mask).sum())
        raise KernelBug("poison", f"{use} {count} elements of a masked load without `other`")


def either(*lanes: Array | None) -> Array | None:
    known = [each for each in lanes if each is not None]
    if not known:
        return None
    result = known[0]
    for each in known[1:]:
        result = result | each
    return result


def _elementwise(original: Method) -> Method:
    def method(self: Any, *operands: Any, **more: Any) -> Any:
        result = original(self, *operands, **more)
        lanes = either(*map(undefined, operands))
        return result if lanes is None else mark(result, lanes)

    return method


def _moves(original: Method) -> Method:
    def method(self: Any, operand: TensorHandle, *more: Any) -> Any:
        result = original(self, operand, *more)
        lanes = undefined(operand)
        if lanes is None:
            return result
        return mark(result, original(self, TensorHandle(lanes, tl.int1), *more).data)

    return method


def _all(handle: TensorHandle) -> Array:
    lanes = undefined(handle)
    return np.zeros(handle.data.shape, bool) if lanes is None else lanes


class PoisonBuilder(NumericBuilder):
    """Operations that pass on which elements are undefined."""

    def binary_op(self, lhs: TensorHandle, rhs: TensorHandle, op: Any) -> TensorHandle:
        result = super().binary_op(lhs, rhs, op)
        left, right = undefined(lhs), undefined(rhs)
        if left is None and right is None:
            return result
        lanes = either(left, right)
        if lhs.data.dtype == np.bool_ and op in (np.bitwise_and, np.bitwise_or):
            # False & undefined is False, True | undefined is True.
            decides = op is np.bitwise_or
            for side, unknown in ((lhs, left), (rhs, right)):
                known = side.data == decides if unknown is None else (side.data == decides) & ~unknown
                lanes = lanes & ~known
        return mark(result, lanes)

    def ternary_op(self, lhs: TensorHandle, rhs: TensorHandle, other: TensorHandle, op: Any) -> TensorHandle:
        result = super().ternary_op(lhs, rhs, other, op)
        lanes = [undefined(each) for each in (lhs, rhs, other)]
        if all(each is None for each in lanes):
            return result
        if op is np.where:
            chosen = np.where(lhs.data, _all(rhs), _all(other))
            return mark(result, either(chosen, lanes[0]))
        return mark(result, either(*lanes))

    def create_splat(self, ret_ty: Any, arg: TensorHandle) -> TensorHandle:
        return mark(super().create_splat(ret_ty, arg), undefined(arg))

    def create_cat(self, lhs: TensorHandle, rhs: TensorHandle) -> TensorHandle:
        return mark(super().create_cat(lhs, rhs), np.concatenate([_all(lhs), _all(rhs)]))

    def create_join(self, lhs: TensorHandle, rhs: TensorHandle) -> TensorHandle:
        return mark(super().create_join(lhs, rhs), np.stack([_all(lhs), _all(rhs)], axis=-1))

    def create_split(self, val: TensorHandle) -> tuple[TensorHandle, TensorHandle]:
        one, two = super().create_split(val)
        lanes = _all(val)
        return mark(one, lanes[..., 0]), mark(two, lanes[..., 1])

    def create_gather(self, src: TensorHandle, indices: TensorHandle, axis: int) -> TensorHandle:
        require(indices, "a gather reads at")
        return mark(super().create_gather(src, indices, axis), np.take_along_axis(_all(src), indices.data, axis=axis))

    def create_histogram(self, data: TensorHandle, bins: int, mask: TensorHandle | None) -> TensorHandle:
        if mask is not None:
            require(mask, "the mask of a histogram has")
        require(data, "a histogram counts", None if mask is None else mask.data)
        return super().create_histogram(data, bins, mask)

    def create_dot(self, a: TensorHandle, b: TensorHandle, d: TensorHandle, *more: Any) -> TensorHandle:
        result = super().create_dot(a, b, d, *more)
        if undefined(a) is None and undefined(b) is None:
            return mark(result, undefined(d))
        rows = _all(a).any(-1)[..., :, None]  # an undefined element of a spoils its row, one of b its column
        columns = _all(b).any(-2)[..., None, :]
        return mark(result, rows | columns | _all(d))


for _name in _ELEMENTWISE:
    setattr(PoisonBuilder, _name, _elementwise(getattr(NumericBuilder, _name)))
for _name in _MOVES:
    setattr(PoisonBuilder, _name, _moves(getattr(NumericBuilder, _name)))
