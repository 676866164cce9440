"""Records a sequence of kernel launches and replays it without Python between them, like a CUDA graph.

When one row is decoded, launches from Python take most of the time.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from trunkline.kernels.cpu.threads import Kernel, barrier, call, int64s, recorder, team_size, thread

from .memory import Memory

COUNTS = ("rows", "decodes", "prompts")  # a kernel's arguments have one of them: how much it computes


class Recording:
    """A list of launches. Inside ``with recording:``, this thread's launches are recorded and not run.

    :meth:`run` runs them in order, in one parallel region, with a barrier after each. The :data:`COUNTS`
    may differ between runs. All other arguments stay, addresses too, so inputs, outputs and scratch
    memory must live as long as the recording. Only our kernels are recorded; torch's operators run
    immediately, once.
    """

    serial = False

    def __init__(self, former: Recording | None = None) -> None:
        """``former``: a recording whose memory this one shares, because they never run at the same time."""
        self._launches: list[tuple[Kernel, bytes, bool]] = []
        self.memory: Memory = Memory() if former is None else former.memory
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
