"""Triton's interpreter with right arithmetic and with checks, for kernels on CPU tensors (``TRITON_INTERPRET=1``).

    with checked() as session:
        kernel[grid](x, out, n, BLOCK=64)

raises :class:`KernelBug` for what the interpreter lets pass and a GPU doesn't: accesses outside of a tensor, misaligned
ones, int32 overflow, use of what a masked load left undefined, races between programs, wrong claims to the compiler,
``tl.device_assert``. Programs run in a random order, whose seed is printed and repeated by
``TRUNKLINE_PROGRAM_ORDER_SEED``. bfloat16 and fp8 round to nearest even, and fp32 products with the default
``input_precision`` read TF32. Not checked: races between the threads of one program apart from one store's lanes, and
everything that only hardware shows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import triton

from .builder import Checks
from .errors import KernelBug
from .interpreter import Order, Session, installed, order_seed
from .pool import virtual_tensor

__all__ = ["VERSIONS", "Checks", "KernelBug", "Session", "checked", "unsupported", "virtual_tensor"]

VERSIONS = ("3.7.1", "3.8.0", "3.9.0")
"""The versions of triton that it was tested with. The interpreter of 3.6.0 fails with numpy 2.4 and newer."""


def unsupported() -> str | None:
    """Why the checked interpreter can't be used here, None when it can: what a test is skipped with."""
    if triton.__version__ not in VERSIONS:
        return f"the checked interpreter works with triton {', '.join(VERSIONS)}, not with {triton.__version__}"
    if not triton.knobs.runtime.interpret:
        return "TRITON_INTERPRET=1 must be set before triton is imported"
    return None


@contextmanager
def checked(
    checks: Checks | None = None,
    *,
    order: Order = "random",
    seed: int | None = None,
    allowed: tuple[torch.Tensor, ...] = (),
) -> Iterator[Session]:
    """Check every launch in the ``with`` statement. Raises RuntimeError where it can't be used.

    ``allowed``: tensors that kernels reach through addresses in memory instead of arguments.
    """
    if reason := unsupported():
        raise RuntimeError(reason)
    session = Session(checks or Checks(), order, order_seed() if seed is None else seed, allowed)
    if order == "random":
        print(f"checked interpreter: TRUNKLINE_PROGRAM_ORDER_SEED={session.seed}")
    with installed(session):
        yield session
