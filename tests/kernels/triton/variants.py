"""Which variants Triton would compile for launches, without compiling any."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from triton.runtime.interpreter import InterpretedFunction

Variant = tuple[tuple[str, object], ...]


@contextmanager
def recorded(*, run: bool = False) -> Iterator[dict[str, set[Variant]]]:
    """By name of the kernel, the different variants of all launches in the ``with`` statement, which run or don't.

    A variant is compiled for the values of constants and options, for the arguments' types, and unless an argument is
    in ``do_not_specialize``, for whether it is 1, or an address or a number that is divisible by 16.
    """
    found: dict[str, set[Variant]] = defaultdict(set)
    launch = InterpretedFunction.run

    def note(kernel: Any, *arguments: Any, grid: Any, warmup: bool = False, **named: Any) -> None:
        parameters = inspect.signature(kernel.fn).parameters
        bound = inspect.signature(kernel.fn).bind(*arguments, **{k: v for k, v in named.items() if k in parameters})
        general = kernel.kwargs.get("do_not_specialize") or ()
        key = [
            (name, value if "constexpr" in str(parameters[name].annotation) else _specialised(value, name in general))
            for name, value in bound.arguments.items()
        ]
        options = [(name, value) for name, value in named.items() if name not in parameters]
        found[kernel.fn.__name__].add((*key, *options))
        if run:
            launch(kernel, *arguments, grid=grid, warmup=warmup, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpretedFunction, "run", note)
        yield found


def _specialised(value: Any, general: bool) -> object:
    """What of an argument is compiled into the kernel."""
    if isinstance(value, torch.Tensor):
        return value.dtype, general or value.data_ptr() % 16 == 0
    if value is None or isinstance(value, bool | float):
        return type(value)
    kind = "int32" if abs(value) < 2**31 else "int64"
    return (kind,) if general else (kind, value == 1, value % 16 == 0)


def differences(variants: set[Variant]) -> dict[str, set[object]]:
    """The arguments and options in which variants differ, with their values."""
    values: dict[str, set[object]] = defaultdict(set)
    for variant in variants:
        for name, value in variant:
            values[name].add(value)
    return {name: found for name, found in values.items() if len(found) > 1}
