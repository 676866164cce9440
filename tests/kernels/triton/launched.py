"""Which variants of kernels a GPU would compile for the launches of Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from triton.compiler.compiler import make_backend
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction, create_function_from_signature

from .gate.driver import gpu_target


@cache
def _binder(kernel: InterpretedFunction[Any]) -> Any:
    """Triton's own function that gives the specialisation of a launch: types, constants, divisibility by 16."""
    compiled: Any = JITFunction(kernel.fn, **kernel.kwargs)
    return create_function_from_signature(compiled.signature, compiled.params, make_backend(gpu_target("sm_90")))


@contextmanager
def variants() -> Iterator[set[str]]:
    """While it lasts, the set gets a description of each variant that is launched."""
    found: set[str] = set()
    run = InterpretedFunction.run

    def record(self: Any, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> Any:
        _, specialization, options = _binder(self)(*arguments, **named)
        found.add(f"{self.__name__} {specialization} {options}")
        return run(self, *arguments, grid=grid, warmup=warmup, **named)

    InterpretedFunction.run = record
    try:
        yield found
    finally:
        InterpretedFunction.run = run
