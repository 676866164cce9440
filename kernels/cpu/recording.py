"""Records a sequence of kernel launches and replays it without Python between them, like a CUDA graph; or runs launches
that don't depend on each other in one parallel region.

When one row is decoded, launches from Python take most of the time.
"""

from __future__ import annotations

from functools import cache
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .threads import Kernel, barrier, int64s, recorder, team_size, thread

COUNTS = ("rows", "decodes", "prompts")  # a kernel's arguments have one of them: how much it computes


class Recording:
    """A list of launches. Inside ``with recording:``, this thread's launches are recorded and not run.

    :meth:`run` runs them in order, in one parallel region, with a barrier after each. The :data:`COUNTS`
    may differ between runs. All other arguments stay, addresses too, so inputs, outputs and scratch
    memory must live as long as the recording. Only our kernels are recorded; torch's operators run
    immediately, once.
    """

    def __init__(self, former: Recording | None = None) -> None:
        """``former``: a recording whose scratch memory this one shares, because they never run at the same time."""
        self._launches: list[tuple[Kernel, bytes, bool]] = []
        self.kept_alive: list[torch.Tensor] = []
        self._scratch: dict[bool, list[torch.Tensor]] = {True: [], False: []} if former is None else former._scratch
        self._team = 1
        self._blocks = self._program = self._claimed = np.empty(0, np.int64)
        self._counts: dict[str, np.ndarray] = {}

    def __enter__(self) -> Recording:
        assert recorder.recording is None, "recordings can't be nested"
        recorder.recording = self
        self._team = team_size()
        return self

    def __len__(self) -> int:
        """Number of launches so far."""
        return len(self._launches)

    def __exit__(self, kind: object, *_: object) -> None:
        recorder.recording = None
        if kind is None:
            self._link()

    def _link(self) -> None:
        """Copy the launches' argument records into one array, and write the program that :func:`_replay` runs."""
        blocks = [np.frombuffer(block, np.int64) for _, block, _ in self._launches]
        starts = np.cumsum([0, *(len(block) for block in blocks)])[:-1]
        self._blocks = np.concatenate(blocks)
        places = [
            {name: start + i for i, name in enumerate(task.fields)}
            for start, (task, _, _) in zip(starts, self._launches, strict=True)
        ]
        self._counts = {name: np.array([place[name] for place in places if name in place], np.int64) for name in COUNTS}
        self._claimed = np.array([place["claimed"] for place in places if "claimed" in place], np.int64)
        functions = [task.address for task, _, _ in self._launches]
        addresses = self._blocks.ctypes.data + 8 * starts
        single_thread = [single_thread for _, _, single_thread in self._launches]
        counts = [self._blocks.ctypes.data + 8 * place[name] for place in places for name in COUNTS if name in place]
        columns = functions, addresses, single_thread, counts
        self._program = np.ascontiguousarray(np.stack(columns, axis=1), dtype=np.int64)

    def record(self, task: Kernel, block: bytes, single_thread: bool) -> None:
        """Record one launch; called by :meth:`.Kernel.run`."""
        self._launches.append((task, block, single_thread))

    def keep_alive(self, tensor: torch.Tensor) -> torch.Tensor:
        """Keep ``tensor`` alive as long as the recording; returns it."""
        self.kept_alive.append(tensor)
        return tensor

    def scratch(self, size: int, of_threads: bool) -> torch.Tensor:
        """At least ``size`` bytes, which all launches share; another memory for that ``of_threads``."""
        made = self._scratch[of_threads]
        if not made or len(made[-1]) < size:
            made.append(torch.empty(size, dtype=torch.uint8))
        return made[-1]

    def run(self, rows: int, decodes: int = 0, prompts: int = 0, end: int | None = None) -> None:
        """Replay the launches over the first ``rows`` rows of the recorded tensors.

        ``decodes`` and ``prompts``: numbers of sequences for the attention of decoding rows and of prompts. Launches
        whose count is 0 are left out. ``end``: replay the first launches only, as many.
        """
        for name, count in zip(COUNTS, (rows, decodes, prompts), strict=True):
            self._blocks[self._counts[name]] = count
        self._blocks[self._claimed] = 0
        launches = len(self._program) if end is None else end
        _replay().run(self._team, program=self._program.ctypes.data, launches=launches)


class Together:
    """Inside ``with Together(steps):``, this thread's launches are collected; they run at the end of the block.

    A parallel region for each would cost a few microseconds, and threads would wait for each other at its end. Every
    ``steps`` launches in turn need each other's results: the first ones of all run together, then the second ones, and
    so on. Launches that run together must not need each other. In a recording, they are recorded one after another.
    """

    def __init__(self, steps: int = 1) -> None:
        self._steps = steps
        self._launches: list[tuple[Kernel, bytes, bool]] = []
        self._kept: list[torch.Tensor] = []
        self._of_threads: dict[int, torch.Tensor] = {}
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

    def keep_alive(self, tensor: torch.Tensor) -> torch.Tensor:
        """Keep ``tensor`` alive until the launches have run; returns it."""
        self._kept.append(tensor)
        return tensor

    def scratch(self, size: int, of_threads: bool) -> torch.Tensor:
        """``size`` bytes of its own for each launch, or ``of_threads`` the same for all with this size: a thread runs
        them one after another."""
        if not of_threads:
            return self.keep_alive(torch.empty(size, dtype=torch.uint8))
        if size not in self._of_threads:
            self._of_threads[size] = torch.empty(size, dtype=torch.uint8)
        return self._of_threads[size]

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


def keep_alive(tensor: torch.Tensor) -> torch.Tensor:
    """Keep scratch memory alive as long as the recording, if launches are being recorded; returns ``tensor``.

    A recorded launch uses the memory after the function that allocated it has returned.
    """
    return tensor if recorder.recording is None else recorder.recording.keep_alive(tensor)


def scratch_memory(size: int, of_threads: bool = False) -> torch.Tensor:
    """Uninitialised memory for a launch, of at least ``size`` bytes (uint8).

    All launches of a recording share it, so its contents are valid until the next launch that uses some.
    ``of_threads``: each thread has a part of its own, whose contents it needs only while it computes one unit.
    """
    if recorder.recording is None:
        return torch.empty(size, dtype=torch.uint8)
    found: torch.Tensor = recorder.recording.scratch(size, of_threads)
    return found


def _call(typing: Any, function: Any, argument: Any) -> Any:
    """``call(function, argument)``: call the function at an address, with another address as its argument."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        pointer = ir.FunctionType(ir.VoidType(), [ir.IntType(64)]).as_pointer()
        builder.call(builder.inttoptr(values[0], pointer), [values[1]])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


call = intrinsic(_call)


class Arguments:
    """``program`` has four int64 for each launch: function, address of its arguments, 1 if one thread runs it,
    address of the count among its arguments.
    """

    program: int
    launches: int


@cache
def _replay() -> Kernel:
    def body(a: Any) -> None:
        program = int64s(a.program)
        for i in range(a.launches):
            if int64s(program[4 * i + 3])[0] != 0:
                if program[4 * i + 2] == 0 or thread() == 0:
                    call(program[4 * i], program[4 * i + 1])
                barrier()

    return Kernel(body, Arguments)


class TogetherArguments:
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

    return Kernel(body, TogetherArguments)
