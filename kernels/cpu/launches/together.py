"""Runs launches that don't depend on each other in one parallel region."""

from __future__ import annotations

from functools import cache
from itertools import accumulate
from typing import Any

import numpy as np
import torch

from trunkline.kernels.cpu.threads import Kernel, barrier, call, int64s, recorder, team_size, thread

from .memory import Memory


class _OwnMemory(Memory):
    """Launches that run at the same time don't share scratch memory, unless it is that of threads: a thread runs its
    part of them one after another."""

    def __init__(self) -> None:
        super().__init__()
        self._of_threads: dict[int, torch.Tensor] = {}

    def scratch(self, size: int, of_threads: bool) -> torch.Tensor:
        """``size`` bytes of its own for each launch, or ``of_threads`` the same for all with this size."""
        if not of_threads:
            return self.keep_alive(torch.empty(size, dtype=torch.uint8))
        if size not in self._of_threads:
            self._of_threads[size] = torch.empty(size, dtype=torch.uint8)
        return self._of_threads[size]


class Together:
    """Inside ``with Together(steps):``, this thread's launches are collected; they run at the end of the block.

    A parallel region for each would cost a few microseconds, and threads would wait for each other at its end. Every
    ``steps`` launches in turn need each other's results: the first ones of all run together, then the second ones, and
    so on. Launches that run together must not need each other. In a recording, they are recorded one after another.
    """

    serial = False

    def __init__(self, steps: int = 1) -> None:
        self._steps = steps
        self._launches: list[tuple[Kernel, bytes, bool]] = []
        self.memory = _OwnMemory()
        self._outer: Any = None

    def __enter__(self) -> Together:
        self._outer = recorder.recording
        if self._outer is None:
            recorder.recording = self
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        recorder.recording = self._outer
        if kind is None and self._launches:
            self._run()

    def record(self, task: Kernel, block: bytes, single_thread: bool) -> None:
        """Collect one launch; called by :meth:`.Kernel.run`."""
        self._launches.append((task, block, single_thread))

    def _run(self) -> None:
        if len(self._launches) % self._steps:
            raise RuntimeError(f"{len(self._launches)} launches aren't a multiple of {self._steps}")
        launches = [one for step in range(self._steps) for one in self._launches[step :: self._steps]]
        blocks = np.frombuffer(b"".join([block for _, block, _ in launches]), np.uint8).copy()
        starts = [0, *accumulate(len(block) for _, block, _ in launches)]
        base, each = blocks.ctypes.data, len(launches) // self._steps
        rows = [
            (task.address, base + start, single, (number + 1) % each == 0)
            for number, ((task, _, single), start) in enumerate(zip(launches, starts, strict=False))
        ]
        program = np.array(rows, np.int64)
        _run_all().run(team_size(), program=program.ctypes.data, launches=len(rows))


class Arguments:
    """``program`` has four int64 for each launch: function, address of its arguments, 1 if one thread runs it, 1 if
    the launches after it depend on it."""

    program: int
    launches: int


@cache
def _run_all() -> Kernel:
    def body(a: Any) -> None:
        program = int64s(a.program)
        for i in range(a.launches):
            if program[4 * i + 2] == 0 or thread() == 0:
                call(program[4 * i], program[4 * i + 1])
            if program[4 * i + 3] != 0 and i + 1 < a.launches:
                barrier()

    return Kernel(body, Arguments)
