"""Launches of Triton's interpreter while torch's operations are watched: each is one operation, like on a GPU."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

Note = Callable[[Callable[..., None], tuple[Any, ...], dict[str, Any]], None]


@contextmanager
def opaque_launches(note: Note = lambda launch, arguments, named: None) -> Iterator[None]:
    """What a launch does with torch isn't watched. ``note`` is called before each, with a function that repeats it."""
    module: Any = sys.modules.get("triton.runtime.interpreter")
    if module is None:
        yield
        return
    run = module.InterpretedFunction.run

    def run_unwatched(self: Any, *arguments: Any, **named: Any) -> None:
        def launch(*arguments: Any, **named: Any) -> None:
            with ExitStack() as stack:
                stack.enter_context(torch._C.DisableTorchFunction())
                stack.enter_context(_disable_current_modes())
                run(self, *arguments, **named)

        note(launch, arguments, named)
        launch(*arguments, **named)

    module.InterpretedFunction.run = run_unwatched
    try:
        yield
    finally:
        module.InterpretedFunction.run = run
