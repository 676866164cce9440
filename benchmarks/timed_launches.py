"""The kernels that run several launches at once, with times: each thread reads the processor's counter (x86)."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core.cgutils import get_or_insert_function
from numba.extending import intrinsic

from trunkline.kernels.cpu.launches import row_blocks
from trunkline.kernels.cpu.threads import Kernel, barrier, call, call_alone, int64s, thread


class Timed:
    """The arguments of :func:`replay`: those of a recording, and where each thread writes its times.

    ``times`` int64 [threads, 2 · launches + 1]: the counter before and after each launch, and at the end.
    """

    program: int
    launches: int
    times: int


class TimedBlocks(row_blocks.Arguments):
    """The arguments of :func:`run_blocks`: where each thread adds up its times, int64 [threads, launches]."""

    times: int


class Stamp:
    """The arguments of :func:`clock`: where the counter is written."""

    out: int
    index: int


def _read_counter(typing: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        kind = ir.FunctionType(ir.IntType(64), [])
        return builder.call(get_or_insert_function(builder.module, kind, "llvm.readcyclecounter"), [])

    return types.int64(), generate


counter = intrinsic(_read_counter)


@cache
def replay() -> Kernel:
    """As the one of kernels/cpu/launches/recording.py, with times."""

    def body(a: Any) -> None:
        program, times = int64s(a.program), int64s(a.times + thread() * (2 * a.launches + 1) * 8)
        for i in range(a.launches):
            times[2 * i] = counter()
            runs = int64s(program[4 * i + 3])[0] != 0
            if runs and (program[4 * i + 2] == 0 or thread() == 0):
                call(program[4 * i], program[4 * i + 1])
            times[2 * i + 1] = counter()
            if runs:
                barrier()
        times[2 * a.launches] = counter()

    return Kernel(body, Timed)


@cache
def run_blocks() -> Kernel:
    """As the one of kernels/cpu/launches/row_blocks.py, with times."""

    def body(a: Any) -> None:
        number = np.int64(thread())
        program, times = int64s(a.program + 16 * number * a.launches), int64s(a.times + 8 * number * a.launches)
        while row_blocks.take_block(a, number):
            for i in range(a.launches):
                times[i] -= counter()
                call_alone(program[2 * i], program[2 * i + 1])
                times[i] += counter()

    return Kernel(body, TimedBlocks)


@cache
def clock() -> tuple[Callable[[], int], float]:
    """A function that reads the counter, and how many seconds one step of it takes."""

    def body(a: Any) -> None:
        int64s(a.out)[a.index] = counter()

    kernel, out = Kernel(body, Stamp), np.zeros(1, np.int64)

    def read() -> int:
        kernel.run(1, out=out.ctypes.data, index=0)
        return int(out[0])

    first, began = read(), time.perf_counter()
    time.sleep(0.1)
    return read, (time.perf_counter() - began) / (read() - first)
