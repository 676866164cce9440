"""Long sequences of launches, run block by block of rows: each thread runs all launches for rows of its own.

If every launch is divided among all threads, each reads what the others have written, from the memory beyond its own
caches, and waits for the others at the end. In blocks, intermediate results stay in the L2 cache of one core. The
weights are read once for each block, so this is for many rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any

import numpy as np
import torch
from numba import njit

from trunkline.kernels.cpu.threads import OPTIONS, Kernel, call_alone, claim, int64s, recorder, team_size, thread
from trunkline.kernels.cpu.units import TILE

from .changes import changes_of, joined, places_in, write_changes
from .memory import Memory

CAPACITY = 168  # rows of a block, at most: more gain nothing, but intermediate results need more of the cache
MIN_BLOCK = 36  # rows of a block, if there are as many: with fewer, reading the weights takes most of the time
_STEP = 4  # rows that small blocks are a multiple of


class RowBlocks:
    """A list of launches whose results for a row need only that row's inputs.

    Inside ``with blocks:``, this thread's launches are recorded and not run. They get ``inputs``, tensors
    [CAPACITY, width], in place of tensors of any number of rows, which :meth:`run` is given. Scratch memory is that of
    :func:`.memory.keep_alive`; there is a copy of it for each thread. All other addresses stay, so what is there must
    live as long. Only our kernels are recorded; torch's operators run immediately, once.
    """

    serial = True

    def __init__(self, inputs: Sequence[torch.Tensor], former: RowBlocks | None = None) -> None:
        """``former``: blocks whose scratch memory these share, because they never run at the same time."""
        self._inputs = inputs
        self.memory: Memory = Memory() if former is None else former.memory
        self._copies: dict[int, list[torch.Tensor]] = {} if former is None else former._copies
        self.launches: list[tuple[Kernel, bytes]] = []
        self._program: np.ndarray | None = None  # of each thread: each launch's function and address of its arguments

    def __enter__(self) -> RowBlocks:
        assert recorder.recording is None, "recordings can't be nested"
        recorder.recording = self
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        recorder.recording = None

    def record(self, task: Kernel, block: bytes, single_thread: bool) -> None:
        """Record one launch; called by :meth:`.Kernel.run`."""
        self.launches.append((task, block))

    def _link(self) -> np.ndarray:
        """Give each thread its copy of the arguments, with the addresses of its scratch memory; returns its program."""
        arguments = joined(self.launches)
        self._team = team_size()
        self._arguments = np.tile(arguments, (self._team, 1))
        for tensor in self.memory.tensors:
            for place in places_in(arguments, tensor):
                for number, copy in enumerate(self._of_threads(tensor)):
                    self._arguments[number, place] += copy.data_ptr() - tensor.data_ptr()
        inputs = [(one, one.stride(0) * one.itemsize) for one in self._inputs]
        self._changes = np.array(changes_of(self.launches, inputs), np.int64).reshape(-1, 4)
        self._starts = np.zeros(len(self._inputs), np.int64)
        offsets = np.cumsum([0, *(len(block) for _, block in self.launches)])[:-1]
        functions = np.array([task.address for task, _ in self.launches])
        addresses = [row.ctypes.data + offsets for row in self._arguments]
        return np.stack([np.stack([functions, each], axis=1) for each in addresses])

    def _of_threads(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Scratch memory like ``tensor`` for each thread."""
        copies = self._copies.setdefault(tensor.data_ptr(), [tensor])
        copies += [torch.empty_like(tensor) for _ in range(len(copies), self._team)]
        return copies[: self._team]

    def run(self, *tensors: torch.Tensor) -> None:
        """Run the launches over all rows of ``tensors``, which stand in the place of ``inputs``.

        They are contiguous, of one number of rows, and each of its input's width and dtype; ValueError otherwise.
        """
        if self._program is None:
            self._program = self._link()
        rows = len(tensors[0])
        for number, (given, like) in enumerate(zip(tensors, self._inputs, strict=True)):
            if given.shape != (rows, like.shape[1]) or given.dtype != like.dtype or not given.is_contiguous():
                raise ValueError(f"input {number} must be a contiguous [{rows}, {like.shape[1]}] of {like.dtype}")
            self._starts[number] = given.data_ptr()
        bounds = block_bounds(rows, self._team)
        run_blocks().run(
            self._team,
            program=self._program.ctypes.data,
            launches=len(self.launches),
            arguments=self._arguments.ctypes.data,
            arguments_row=self._arguments.shape[1],
            changes=self._changes.ctypes.data,
            changes_count=len(self._changes),
            starts=self._starts.ctypes.data,
            bounds=bounds.ctypes.data,
            blocks=len(bounds) - 1,
            claimed=0,
        )


@lru_cache(maxsize=64)
def block_bounds(rows: int, team: int) -> np.ndarray:
    """The first row of each block, and ``rows`` at the end: int64.

    As many blocks of a size as threads, smaller and smaller ones, so that all threads end at the same time, also if
    one is slower than the others.
    """
    bounds = [0]
    while (left := rows - bounds[-1]) > 2 * team * MIN_BLOCK:
        size = min(CAPACITY, max(MIN_BLOCK, left // (2 * team) // TILE * TILE))
        bounds += [bounds[-1] + (i + 1) * size for i in range(team)]
    size = -(-left // (team * _STEP)) * _STEP
    bounds += [min(bounds[-1] + (i + 1) * size, rows) for i in range(team)]
    return np.unique(np.array(bounds, np.int64))


class Arguments:
    """The kernel's arguments: addresses of int64, and numbers."""

    program: int  # of each thread: for each launch, its function and the address of its arguments
    launches: int
    arguments: int  # [threads, arguments_row]: those of all launches
    arguments_row: int
    changes: int  # see :func:`.changes_of`
    changes_count: int
    starts: int  # addresses of the inputs
    bounds: int
    blocks: int
    claimed: int  # blocks that threads have claimed so far


def _take_block(a: Any, number: int) -> bool:
    """Claim a block for the thread ``number``, and write its rows and addresses into the arguments of its launches.

    False if none is left.
    """
    block = claim(a, 1)
    if block >= a.blocks:
        return False
    bounds, arguments = int64s(a.bounds), a.arguments + 8 * number * a.arguments_row
    first = bounds[block]
    write_changes(arguments, a.changes, a.changes_count, a.starts, first, bounds[block + 1] - first)
    return True


take_block = njit(**OPTIONS)(_take_block)


@cache
def run_blocks() -> Kernel:
    """Each thread takes blocks, and runs all launches for each."""
    alone = call_alone  # in the closure, and so in the name of the stored code: it is another one without OpenMP

    def body(a: Any) -> None:
        number = np.int64(thread())
        program = int64s(a.program + 16 * number * a.launches)
        while take_block(a, number):
            for i in range(a.launches):
                alone(program[2 * i], program[2 * i + 1])

    return Kernel(body, Arguments)
