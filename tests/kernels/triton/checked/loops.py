"""Loops over ``range`` and ``tl.range``, whose variable is a tensor of int32 or int64, as on a GPU.

Upstream's is a Python int, which never overflows, and from which int32 is computed even if a bound is int64.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import triton.language as tl
import triton.runtime.interpreter as upstream
from triton.runtime.interpreter import TensorHandle

NAME = "_checked_range"  # of :func:`loop` in rewritten kernels
REWRITTEN: dict[Callable[..., Any], Callable[..., Any]] = {}
"""Rewritten kernels: upstream remembers its own without the change of :class:`LoopTransformer`."""


def loop(first: Any, last: Any = None, step: Any = None, **_: Any) -> Iterator[Any]:
    """The values of ``range(first, last, step)``: of int64 if a bound is, or if one doesn't fit into int32."""
    given = [0, first] if last is None else [first, last]
    given.append(1 if step is None else step)
    values = [int(each) for each in given]
    wide = any(isinstance(each, tl.tensor) and each.dtype == tl.int64 for each in given)
    kind = tl.int64 if wide or any(abs(each) >= 2**31 for each in values) else tl.int32
    data = np.int64 if kind == tl.int64 else np.int32
    return (tl.tensor(TensorHandle(np.array([at], data), kind), kind) for at in range(*values))


class LoopTransformer(upstream.ASTTransformer):  # type: ignore[misc]
    """Rewrites a kernel as upstream does, and its loops over Python's ``range``."""

    def visit_For(self, node: ast.For) -> ast.AST:
        match node.iter:
            case ast.Call(func=ast.Name(id="range")):
                node.iter.func = ast.Name(id=NAME, ctx=ast.Load())
        return self.generic_visit(node)
