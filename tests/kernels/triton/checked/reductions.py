"""Reductions and scans: bfloat16 and fp8 by their values, and what is undefined in the result."""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
import triton.runtime.interpreter as upstream
from triton.runtime.interpreter import TensorHandle

from .floats import decode, encode, is_bits
from .poison import either, mark, undefined


def _tensor(data: Any, kind: tl.dtype) -> Any:
    return tl.tensor(TensorHandle(data, kind), tl.block_type(kind, list(data.shape)) if data.ndim else kind)


def _widened(operand: Any) -> Any:
    kind = operand.dtype
    return _tensor(decode(operand.handle.data, kind), tl.float32) if is_bits(kind) else operand


def _narrowed(result: Any, kind: tl.dtype) -> Any:
    """A result in the type of its operand; float32 was used in between."""
    if not is_bits(kind):
        return result
    handle = TensorHandle(encode(result.handle.data, kind), kind)
    return tl.tensor(handle, tl.block_type(kind, list(result.shape)) if result.shape else kind)


class CheckedReduce(upstream.ReduceOps):  # type: ignore[misc]
    """A reduction over an undefined element is undefined."""

    def apply(self, operands: Any) -> Any:
        if not isinstance(operands, tuple):
            return self.apply((operands,))[0]
        lanes = either(*(undefined(each.handle) for each in operands))
        results = super().apply(tuple(map(_widened, operands)))
        results = tuple(_narrowed(result, each.dtype) for result, each in zip(results, operands, strict=False))
        if lanes is not None:
            spoiled = np.asarray(lanes.any(self.axis, keepdims=self.keep_dims))
            for each in results:
                mark(each.handle, spoiled)
        return results


class CheckedScan(upstream.ScanOps):  # type: ignore[misc]
    """A scan is undefined from the first undefined element on."""

    def apply(self, operands: Any) -> Any:
        if not isinstance(operands, tuple):
            return self.apply((operands,))[0]
        lanes = either(*(undefined(each.handle) for each in operands))
        results = super().apply(tuple(map(_widened, operands)))
        results = tuple(_narrowed(result, each.dtype) for result, each in zip(results, operands, strict=True))
        if lanes is not None:
            ordered = np.flip(lanes, self.axis) if self.reverse else lanes
            spoiled = np.logical_or.accumulate(ordered, self.axis)
            for each in results:
                mark(each.handle, np.flip(spoiled, self.axis) if self.reverse else spoiled)
        return results
