"""The launches of several groups of rows in one parallel region.

A parallel region for each would cost a few microseconds, and threads would wait for each other at its end. For few
rows, Python's part in a launch would take longer than the kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch

from trunkline.kernels.cpu.threads import Kernel, barrier, call, int32s, int64s, recorder, team_size, thread

from .changes import changes_of, joined, write_changes
from .memory import Memory

_RECORDED = 256  # rows when launches are recorded: any number that isn't small


class Groups:
    """Launches of several groups, recorded once for each; :meth:`run` runs those of all groups that have rows.

    The first launches of all groups run together, then the second ones, which need them, and so on. Inputs, outputs and
    scratch memory are given or allocated for each run; all other addresses stay, so what is there must live as long.
    """

    serial = False

    def __init__(
        self, groups: Sequence[Callable[[torch.Tensor, torch.Tensor], Any]], x: torch.Tensor, out: torch.Tensor
    ) -> None:
        """Each of ``groups`` launches the same number of kernels, for rows of the kinds of ``x`` and ``out``.

        RuntimeError if the numbers differ, or for memory that :meth:`run` doesn't allocate.
        """
        stand_ins = [torch.empty(_RECORDED, one.shape[1], dtype=one.dtype) for one in (x, out)]
        self._row_bytes = [one.shape[1] * one.itemsize for one in stand_ins]
        self._scratch_row = self._scratch_of_threads = 0  # bytes
        arguments: list[np.ndarray] = []
        changes: list[tuple[int, ...]] = []
        ends: list[int] = []  # of each group among the changes
        functions: list[list[int]] = []
        offsets: list[list[int]] = []
        size = 0
        for compute in groups:
            launches, rows, of_threads = self._record(compute, stand_ins)
            row = len(rows) // _RECORDED
            inputs = [*zip(stand_ins, self._row_bytes, strict=True), (rows, row), (of_threads, 0)]
            changes += [(size + place, *change) for place, *change in changes_of(launches, inputs)]
            ends.append(len(changes))
            arguments.append(joined(launches))
            functions.append([task.address for task, _ in launches])
            offsets.append([size * 8 + start for start in _starts(launches)])
            size += len(arguments[-1])
            self._scratch_row = max(self._scratch_row, row)
            self._scratch_of_threads = max(self._scratch_of_threads, len(of_threads))
        if len({len(one) for one in functions}) != 1:
            raise RuntimeError("groups have different numbers of launches")
        self._team, self._steps = team_size(), len(functions[0])
        self._arguments = np.concatenate(arguments)
        self._changes, self._ends = np.array(changes, np.int64), np.array(ends, np.int64)
        addresses = self._arguments.ctypes.data + np.array(offsets, np.int64)
        self._program = np.ascontiguousarray(np.stack([np.array(functions, np.int64), addresses], axis=2))

    def _record(
        self, compute: Callable[[torch.Tensor, torch.Tensor], Any], stand_ins: list[torch.Tensor]
    ) -> tuple[list[tuple[Kernel, bytes]], torch.Tensor, torch.Tensor]:
        """The launches of a group, and what stands for its scratch memory: that with a part for each row, and that of
        threads.
        """
        self.memory = Memory()
        self._launches: list[tuple[Kernel, bytes]] = []
        assert recorder.recording is None, "recordings can't be nested"
        recorder.recording = self
        try:
            compute(*stand_ins)
        finally:
            recorder.recording = None
        rows, of_threads = (self.memory.scratch(0, of_threads=kind) for kind in (False, True))
        if len(self.memory.tensors) > 2:
            raise RuntimeError("the launches of a group have at most one piece of scratch memory of each kind")
        return self._launches, rows, of_threads

    def record(self, task: Kernel, block: bytes, single_thread: bool) -> None:
        """Record one launch; called by :meth:`.Kernel.run`. RuntimeError for one that a single thread must run."""
        if single_thread:
            raise RuntimeError("launches of groups run on all threads")
        self._launches.append((task, block))

    def run(self, x: torch.Tensor, out: torch.Tensor, ends: torch.Tensor) -> None:
        """Rows of ``x`` [N, width] -> ``out`` [N, width], both contiguous. Group ``g`` ends before row ``ends[g]``,
        int32 [groups].
        """
        scratch = torch.empty(len(x) * self._scratch_row, dtype=torch.uint8)
        of_threads = torch.empty(self._scratch_of_threads, dtype=torch.uint8)
        starts = np.array([one.data_ptr() for one in (x, out, scratch, of_threads)], np.int64)
        _run_groups().run(
            self._team,
            program=self._program.ctypes.data,
            steps=self._steps,
            groups=len(self._ends),
            arguments=self._arguments.ctypes.data,
            changes=self._changes.ctypes.data,
            changes_ends=self._ends.ctypes.data,
            starts=starts.ctypes.data,
            ends=ends.data_ptr(),
        )


def _starts(launches: Sequence[tuple[Kernel, bytes]]) -> list[int]:
    """Where the arguments of each launch begin among those of all, in bytes."""
    return [int(one) for one in np.cumsum([0, *(len(block) for _, block in launches)])[:-1]]


class Arguments:
    """The kernel's arguments: addresses of int64 but for ``ends``, and numbers."""

    program: int  # for each launch of each group, its function and the address of its arguments
    steps: int  # launches of a group
    groups: int
    arguments: int
    changes: int  # see :func:`.changes_of`
    changes_ends: int  # of each group among the changes
    starts: int  # addresses of x, out and scratch memory
    ends: int  # int32


@cache
def _run_groups() -> Kernel:
    def body(a: Any) -> None:
        program, ends, changes_ends = int64s(a.program), int32s(a.ends), int64s(a.changes_ends)
        if thread() == 0:
            row, change = np.int64(0), np.int64(0)
            for g in range(a.groups):
                end, count = np.int64(ends[g]), changes_ends[g] - change
                if end > row:
                    write_changes(a.arguments, a.changes + 32 * change, count, a.starts, row, end - row)
                row, change = end, changes_ends[g]
        for step in range(a.steps):
            barrier()
            row = np.int64(0)
            for g in range(a.groups):
                end = np.int64(ends[g])
                if end > row:
                    place = 2 * (g * a.steps + step)
                    call(program[place], program[place + 1])
                row = end

    return Kernel(body, Arguments)
