"""Launches noted once and run again, without Python between them: what decoding one row spends most on."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .threads import Task, barrier, int64s, recorder, team_size, thread


class Recording:
    """A list of launches. Inside ``with recording:`` this thread's kernels are noted, not run.

    :meth:`run` does them in order, in one parallel region with a barrier after each. The number of
    rows may be another each time; addresses and all else stay, so inputs, outputs and scratch must
    live as long as the recording. Only our kernels are noted: torch's operators run as ever.
    """

    def __init__(self) -> None:
        self._launches: list[tuple[Task, bytes, bool]] = []
        self.held: list[torch.Tensor] = []
        self._blocks = self._program = self._rows = self._claimed = np.empty(0, np.int64)

    def __enter__(self) -> Recording:
        assert recorder.recording is None, "recordings don't nest"
        recorder.recording = self
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        recorder.recording = None
        if kind is None:
            self._link()

    def _link(self) -> None:
        """Lay the launches' arguments out where :func:`_player` finds them."""
        blocks = [np.frombuffer(block, np.int64) for _, block, _ in self._launches]
        starts = np.cumsum([0, *(len(block) for block in blocks)])[:-1]
        self._blocks = np.concatenate(blocks)
        places = [
            {name: start + i for i, name in enumerate(task.fields)}
            for start, (task, _, _) in zip(starts, self._launches, strict=True)
        ]
        self._rows = np.array([place["rows"] for place in places])
        self._claimed = np.array([place["claimed"] for place in places if "claimed" in place], np.int64)
        functions = [task.address for task, _, _ in self._launches]
        addresses = self._blocks.ctypes.data + 8 * starts
        alone = [alone for _, _, alone in self._launches]
        self._program = np.ascontiguousarray(np.stack([functions, addresses, alone], axis=1), dtype=np.int64)

    def take(self, task: Task, block: bytes, alone: bool) -> None:
        """Note one launch; kernels' own affair."""
        self._launches.append((task, block, alone))

    def hold(self, tensor: torch.Tensor) -> torch.Tensor:
        """Keep scratch memory alive as long as the launches that use it."""
        self.held.append(tensor)
        return tensor

    def run(self, rows: int) -> None:
        """Do it all over the first ``rows`` rows."""
        self._blocks[self._rows] = rows
        self._blocks[self._claimed] = 0
        _player().run(team_size(), program=self._program.ctypes.data, launches=len(self._program))


def hold(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor``, which a kernel's launch uses after the launcher returns if it is being recorded."""
    return tensor if recorder.recording is None else recorder.recording.hold(tensor)


def _call(typing: Any, function: Any, argument: Any) -> Any:
    """Call the function at one address with another as its argument."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        pointer = ir.FunctionType(ir.VoidType(), [ir.IntType(64)]).as_pointer()
        builder.call(builder.inttoptr(values[0], pointer), [values[1]])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


call = intrinsic(_call)


class Arguments:
    """What the player gets: for each launch the function, its arguments' address, and whether one thread does it."""

    program: int
    launches: int


@cache
def _player() -> Task:
    def body(a: Any) -> None:
        program = int64s(a.program)
        for i in range(a.launches):
            if program[3 * i + 2] == 0 or thread() == 0:
                call(program[3 * i], program[3 * i + 1])
            barrier()

    return Task(body, Arguments)
