"""The operations of a kernel with right arithmetic for the float types that upstream keeps as bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
import triton.runtime.interpreter as upstream
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from .floats import decode, encode, is_bits, round_to_tf32

_ROUND_TO_ZERO = upstream._ir.ROUNDING_MODE.RTZ
_TF32 = upstream._ir.INPUT_PRECISION.TF32


class NumericBuilder(InterpreterBuilder):  # type: ignore[misc]
    """bfloat16 and fp8 by their values instead of their bits, and TF32 rounding of fp32 products."""

    def binary_op(self, lhs: TensorHandle, rhs: TensorHandle, op: Any) -> TensorHandle:
        kind = lhs.dtype.scalar
        if not is_bits(kind):
            return super().binary_op(lhs, rhs, op)
        values = op(decode(lhs.data, kind), decode(rhs.data, rhs.dtype.scalar))
        if values.dtype == np.bool_:
            return TensorHandle(values, tl.int1)
        return TensorHandle(encode(values, kind), kind)

    def unary_op(self, arg: TensorHandle, op: Any) -> TensorHandle:
        kind = arg.dtype.scalar
        if not is_bits(kind):
            return super().unary_op(arg, op)
        return TensorHandle(encode(op(decode(arg.data, kind)), kind), kind)

    def ternary_op(self, lhs: TensorHandle, rhs: TensorHandle, other: TensorHandle, op: Any) -> TensorHandle:
        kind = other.dtype.scalar
        if op is np.where or not is_bits(kind):
            return super().ternary_op(lhs, rhs, other, op)
        return TensorHandle(encode(op(*(decode(each.data, kind) for each in (lhs, rhs, other))), kind), kind)

    def get_bf16(self, value: float) -> TensorHandle:
        return TensorHandle(encode(np.array([value], np.float32), tl.bfloat16), tl.bfloat16)

    def create_fma(self, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
        kind = z.dtype.scalar
        if not is_bits(kind):
            return super().create_fma(x, y, z)
        a, b, c = (decode(each.data, kind).astype(np.float64) for each in (x, y, z))
        return TensorHandle(encode(a * b + c, kind), kind)

    def create_rsqrt(self, arg: TensorHandle) -> TensorHandle:
        return self.unary_op(arg, lambda values: 1 / np.sqrt(values))

    def create_dot(self, a: TensorHandle, b: TensorHandle, d: TensorHandle, precision: Any, *_: Any) -> TensorHandle:
        x, y = decode(a.data, a.dtype.scalar), decode(b.data, b.dtype.scalar)
        if x.dtype == np.float32 and a.dtype.scalar == tl.float32 and precision == _TF32:
            x, y = round_to_tf32(x), round_to_tf32(y)
        elif x.dtype == np.float16:
            x, y = x.astype(np.float32), y.astype(np.float32)
        elif x.dtype.kind in "iu":
            x, y = x.astype(np.int32), y.astype(np.int32)
        kind = d.dtype.scalar
        total = np.matmul(x, y) + decode(d.data, kind)
        return TensorHandle(encode(total, kind) if is_bits(kind) else total.astype(d.data.dtype), kind)

    def cast_impl(self, src: TensorHandle, dst_type: Any) -> TensorHandle:
        return self._cast(src, dst_type, truncate=False)

    def create_fp_to_fp(self, src: TensorHandle, dst_type: Any, rounding_mode: Any) -> TensorHandle:
        return self._cast(src, dst_type, truncate=rounding_mode == _ROUND_TO_ZERO)

    def _cast(self, src: TensorHandle, dst_type: Any, truncate: bool) -> TensorHandle:
        source, target = src.dtype.scalar, dst_type.scalar
        if not is_bits(source) and not is_bits(target):
            if truncate:
                raise NotImplementedError("the checked interpreter truncates to bfloat16 only")
            return super().cast_impl(src, dst_type)
        values = decode(src.data, source)
        if is_bits(target):
            return TensorHandle(encode(values, target, truncate), target)
        return TensorHandle(values.astype(upstream._get_np_dtype(dst_type)), target)
