"""Checks of every access of a kernel, on top of right arithmetic and of what is known to be undefined."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import triton.language as tl
import triton.runtime.interpreter as upstream
from triton.runtime.interpreter import TensorHandle

from .errors import KernelBug
from .floats import Array, encode, is_bits
from .memory import LaunchMemory
from .poison import PoisonBuilder, mark, require, undefined
from .races import AccessLog, check_lanes

_INT32 = -(2**31), 2**31 - 1
_GARBAGE = 0x5A5A5A5A5A5A5A5A  # what an undefined integer is


@dataclass(frozen=True, slots=True)
class Checks:
    """Which checks are on. All of them report a :class:`KernelBug`."""

    bounds: bool = True  # and alignment to the element's size
    overflow: bool = True
    poison: bool = True
    races: bool = True


@dataclass(slots=True)
class Launch:
    """The launch that is carried out. ``program``: the number of the current program in launch order x, y, z."""

    memory: LaunchMemory
    log: AccessLog | None
    program: int = 0


def _size(pointers: TensorHandle) -> int:
    return max(1, int(pointers.get_element_ty().primitive_bitwidth) // 8)


class CheckedBuilder(PoisonBuilder):
    """``checks`` and ``launch`` are set on the interpreter's builder while the checks are installed."""

    checks: Checks
    launch: Launch | None = None
    # Whether the load that is carried out has an ``other``: upstream drops a scalar 0. None outside of a load.
    given_other: bool | None = None
    _atomic = False  # whether a plain access is part of an atomic operation

    def create_masked_load(
        self, ptrs: TensorHandle, mask: TensorHandle, other: TensorHandle | None, *more: Any, **named: Any
    ) -> TensorHandle:
        ptrs = self._access("load", ptrs, mask)
        hidden = ~np.broadcast_to(mask.data, ptrs.data.shape)
        if other is not None:
            result = super().create_masked_load(ptrs, mask, other, *more, **named)
            lanes = undefined(other)
            return result if lanes is None else mark(result, lanes & hidden)
        if not self.checks.poison or self.given_other or not hidden.any():
            return super().create_masked_load(ptrs, mask, None, *more, **named)
        kind = ptrs.get_element_ty()
        garbage = TensorHandle(_garbage(ptrs.data.shape, kind), kind)
        return mark(super().create_masked_load(ptrs, mask, garbage, *more, **named), hidden)

    def create_masked_store(
        self, ptrs: TensorHandle, value: TensorHandle, mask: TensorHandle, *more: Any, **named: Any
    ) -> Any:
        require(value, "a store writes", mask.data)
        ptrs = self._access("store", ptrs, mask)
        if self.launch is not None and self.launch.log is not None:
            chosen = np.broadcast_to(mask.data, ptrs.data.shape)
            check_lanes(ptrs.data[chosen], np.broadcast_to(value.data, ptrs.data.shape)[chosen])
        return super().create_masked_store(ptrs, value, mask, *more, **named)

    def create_atomic_rmw(self, op: Any, ptr: TensorHandle, val: TensorHandle, mask: TensorHandle, *more: Any) -> Any:
        require(val, "an atomic operation reads", mask.data)
        ptr = self._access("atomic", ptr, mask)
        return super().create_atomic_rmw(op, ptr, val, mask, *more)

    def create_atomic_cas(self, ptr: TensorHandle, cmp: TensorHandle, val: TensorHandle, *more: Any) -> Any:
        ptr = self._access("atomic", ptr, TensorHandle(np.ones_like(ptr.data, dtype=bool), tl.int1))
        return super().create_atomic_cas(ptr, cmp, val, *more)

    def create_atomic_load(self, *arguments: Any) -> Any:
        with self._as_atomic():
            return super().create_atomic_load(*arguments)

    def create_atomic_store(self, *arguments: Any) -> Any:
        with self._as_atomic():
            return super().create_atomic_store(*arguments)

    def create_assert(self, condition: Any, message: str) -> None:
        require(condition, "a device_assert reads")
        if not np.all(getattr(condition, "data", condition)):
            raise KernelBug("assert", f"{message}")

    def create_assume(self, condition: Any) -> None:
        if not np.all(getattr(condition, "data", condition)):
            raise KernelBug("claim", "a condition that tl.assume claims does not hold")

    def cast_impl(self, src: TensorHandle, dst_type: Any) -> TensorHandle:
        if self.checks.overflow and dst_type.scalar == tl.int32 and src.data.dtype == np.int64:
            check_int32(src.data, undefined(src), "cast to int32")
        return super().cast_impl(src, dst_type)

    @contextmanager
    def _as_atomic(self) -> Iterator[None]:
        self._atomic = True
        try:
            yield
        finally:
            self._atomic = False

    def _access(self, kind: str, ptrs: TensorHandle, mask: TensorHandle) -> TensorHandle:
        """Check an access and return real pointers."""
        require(mask, f"the mask of a {kind} has")
        chosen = mask.data if mask.data.shape == ptrs.data.shape else np.broadcast_to(mask.data, ptrs.data.shape)
        require(ptrs, f"the addresses of a {kind} are computed from", chosen)
        if self.launch is None:
            return ptrs
        real, used = self.launch.memory.resolve(ptrs.data, chosen, _size(ptrs), kind)
        if self.launch.log is not None:
            self.launch.log.add("atomic" if self._atomic else kind, used, _size(ptrs), self.launch.program)
        return TensorHandle(real, ptrs.dtype)


def check_int32(values: Array, lanes: Array | None, what: str) -> None:
    """Raise KernelBug when an int64 value doesn't fit into int32; undefined ``lanes`` don't count."""
    low, high = _INT32
    bad = (values < low) | (values > high)
    if lanes is not None:
        bad &= ~lanes
    if bad.any():
        raise KernelBug("overflow", f"{what}: {int(np.broadcast_to(values, bad.shape)[bad][0])} exceeds int32")


def check_arithmetic(lhs: Any, rhs: Any, operation: Any) -> None:
    """Replaces upstream's check of additions, subtractions and products of integers.

    Only int32 is checked: offsets are signed, and hash functions wrap unsigned integers on purpose.
    """
    if lhs.type.scalar != tl.int32:
        return
    compute = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[operation.__name__]
    values = compute(lhs.handle.data.astype(np.int64), rhs.handle.data.astype(np.int64))
    sides = [lanes for lanes in (undefined(lhs.handle), undefined(rhs.handle)) if lanes is not None]
    lanes = None
    for side in sides:
        lanes = side if lanes is None else lanes | side
    check_int32(values, lanes, operation.__name__)


def _garbage(shape: tuple[int, ...], kind: tl.dtype) -> Array:
    if is_bits(kind):
        return np.broadcast_to(encode(np.full(1, np.nan, np.float32), kind), shape)
    plain = upstream._get_np_dtype(kind)
    if plain.kind == "f":
        return np.full(shape, np.nan, plain)
    if plain.kind == "b":
        return np.full(shape, True, plain)
    # Not so large that upstream's sums of a block fail, instead of the check.
    return np.full(shape, _GARBAGE & (np.iinfo(plain).max >> plain.itemsize * 2), plain)
