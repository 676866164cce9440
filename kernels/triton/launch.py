"""What the launchers of all kernels share: the compiler, the architecture, and arguments in a canonical form.

Strides and sizes that a model fixes are compile-time constants: otherwise loads of 16 bytes are impossible where a
stride isn't a multiple of 16. Everything that varies while serving is an ordinary argument, listed in
``do_not_specialize``, so that one compiled variant serves all batches.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from triton import knobs
from triton.runtime import driver

from trunkline.kernels import compiled

INTERPRETER = "interpreter"
SUBFOLDER = "triton"  # of the folder with compiled kernels
LONGEST = 1 << 30  # tokens; windows and chunks are cut to it, so that sums with positions stay within int32


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter (``TRITON_INTERPRET=1``), on tensors of any device."""
    return bool(knobs.runtime.interpret)


def architecture() -> str:
    """The key of :mod:`.plans` for the current device: "sm_80", "sm_90", "sm_100", "gfx942" or "interpreter"."""
    return INTERPRETER if interpreted() else _architecture_of(driver.active)


@cache
def _architecture_of(active: Any) -> str:
    """The architecture whose plans fit the device of a Triton driver.

    Devices of 8.6, 8.9 and 12.x have less shared memory, and no instructions of Hopper or Blackwell servers: the plans
    of sm_80 stay within their limits.
    """
    target = active.get_current_target()
    if target.backend != "cuda":
        return "gfx942"
    return {9: "sm_90", 10: "sm_100"}.get(int(target.arch) // 10, "sm_80")


def multiprocessors() -> int:
    """Of the current device; 0 in the interpreter."""
    return 0 if interpreted() else _multiprocessors_of(driver.active, driver.active.get_current_device())


@cache
def _multiprocessors_of(active: Any, device: int) -> int:
    return int(active.utils.get_device_properties(device)["multiprocessor_count"])


def prepare_compiler() -> None:
    """Note each compilation, and keep the results in a private folder.

    It is below that of :mod:`trunkline.kernels.compiled`, or one that is removed when the process ends. Triton's own
    default is in the home folder, where its mode depends on the user's settings; what is in it is executed.
    """
    if interpreted():
        return
    kept = compiled.folder()
    if kept is None:
        path = Path(tempfile.mkdtemp(prefix="trunkline-kernels-"))
        atexit.register(shutil.rmtree, path, ignore_errors=True)
    else:
        path = kept / SUBFOLDER
        path.mkdir(mode=0o700, exist_ok=True)
    knobs.cache.dir = str(path)
    knobs.compilation.listener = _note


def _note(*, src: Any, times: Any, **_: Any) -> None:
    """Called by Triton's compiler, also for a kernel that it finds in the folder."""
    compiled.note(src.name, times.total / 1e6)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least ``n`` (>= 1)."""
    return 1 << (n - 1).bit_length()


def dot_width(n: int) -> int:
    """The padded size of an axis of length ``n`` in a product of tiles, which needs at least 16."""
    return max(16, power_of_two(n))


def token_major(x: torch.Tensor) -> torch.Tensor:
    """``x`` [T, heads, width], or a copy: strides don't depend on T, and the heads of a token follow one another.

    Kernels have the strides as constants.
    """
    _, heads, width = x.shape
    if x.stride(2) == 1 and x.stride(1) == width and x.stride(0) >= heads * width:
        return x
    return x.new_empty(x.shape).copy_(x)


def row_span(row_ids: Sequence[int] | np.ndarray) -> tuple[int, int]:
    """(first row, number of rows) of consecutive row numbers; ValueError for others."""
    first, count = int(row_ids[0]), len(row_ids)
    if int(row_ids[-1]) - first != count - 1:
        raise ValueError("the triton backend needs consecutive row numbers")
    return first, count


def output(x: torch.Tensor, out: torch.Tensor | None, width: int) -> torch.Tensor:
    """``out``, or a new tensor of ``x``'s shape but for the last size, ``width``. ValueError if ``out`` doesn't fit."""
    shape = (*x.shape[:-1], width)
    if out is None:
        return x.new_empty(shape)
    if out.shape != shape or not out.is_contiguous():
        raise ValueError(f"out must be contiguous and of shape {shape}")
    return out
