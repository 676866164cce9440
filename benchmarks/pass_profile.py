"""Where the time of forward passes goes on the ``cpu`` backend, above what the machine allows.

``python benchmarks/pass_profile.py [MODEL]`` runs the four scenarios in process, and so does ``compare.py``. Kernels
are timed where they run: each thread reads the processor's counter before and after each launch of a recording (x86).
Set ``GOMP_SPINCOUNT`` as the server does (docs/operations.md, "CPU threads").
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import timed_launches
import torch
from checkpoints import folder_of
from floor import Machine, measure
from scenarios import Scenario, build

from trunkline.core import Engine
from trunkline.core.engine.lane import Lane
from trunkline.kernels.cpu.launches import row_blocks
from trunkline.kernels.cpu.launches.recording import COUNTS, Recording
from trunkline.kernels.cpu.launches.row_blocks import RowBlocks
from trunkline.kernels.cpu.processor import has_bfloat16
from trunkline.kernels.cpu.threads import Kernel, recorder
from trunkline.plugins.generation.offline import generate

WAITING, HOST, OUTSIDE = "threads that wait", "host, in passes", "host, between passes"

_names: dict[int, str] = {}  # by the address of a kernel's code: the module that it is from


@dataclass(slots=True)
class Profile:
    """Seconds of a scenario.

    * ``total``, ``passes``: of the scenario.
    * ``in_passes``: in the lane, so without queues, messages and the front.
    * ``spent``, ``least``: by kernel, what it took (the mean of the threads) and the least possible.
    * ``waiting``: until all threads had ended a kernel, or had begun with it; the mean of the threads.
    """

    machine: Machine
    dtype: str
    total: float = 0.0
    passes: int = 0
    in_passes: float = 0.0
    waiting: float = 0.0
    spent: dict[str, float] = field(default_factory=dict)
    least: dict[str, float] = field(default_factory=dict)

    def add(self, kernel: Kernel, arguments: dict[str, Any], rows: int, seconds: float) -> None:
        """One launch over ``rows`` rows."""
        name, least = _names.get(kernel.address, "unknown"), 0.0
        if name == "gemm":
            size = arguments["inputs"] * arguments["outputs"]
            name = f"product {arguments['inputs']} × {arguments['outputs']}"
            # bfloat16 weights; see gemm.py.
            least = max(2 * size / self.machine.bandwidth, 2 * size * rows / self.machine.gemm[self.dtype])
        self.spent[name] = self.spent.get(name, 0.0) + seconds
        self.least[name] = self.least.get(name, 0.0) + least

    def rows(self) -> list[tuple[str, float, float]]:
        """(name, seconds, least possible seconds), the largest difference first."""
        found = [(name, seconds, self.least[name]) for name, seconds in self.spent.items()]
        launched = sum(self.spent.values()) + self.waiting
        found += [
            (WAITING, self.waiting, 0.0),
            (HOST, self.in_passes - launched, 0.0),
            (OUTSIDE, self.total - self.in_passes, 0.0),
        ]
        return sorted(found, key=lambda row: row[2] - row[1])


def name_kernels() -> None:
    """From now on, remember where each kernel is from."""
    original = Kernel.__init__

    def create(self: Kernel, body: Any, *rest: Any, **options: Any) -> None:
        original(self, body, *rest, **options)
        _names[self.address] = body.__module__.rsplit(".", 1)[-1]

    Kernel.__init__ = create  # type: ignore[method-assign]


@contextmanager
def replaced(owner: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """The method or function ``name`` is ``make(original)`` inside."""
    original = getattr(owner, name)
    setattr(owner, name, make(original))
    try:
        yield
    finally:
        setattr(owner, name, original)


@contextmanager
def timing(profile: Profile) -> Iterator[None]:
    """Time passes and kernels."""
    launch = Kernel.run
    replay, (_, step) = timed_launches.replay(), timed_launches.clock()
    # Launches, rows, how long each launch took on each thread in steps of the counter, seconds of the whole.
    replayed: list[tuple[list[Any], int, np.ndarray, float]] = []
    timed_blocks = timed_launches.run_blocks()

    def run(self: Kernel, team: int, single: bool = False, /, **arguments: float) -> None:
        start = time.perf_counter()
        launch(self, team, single, **arguments)
        if recorder.recording is None:
            profile.add(self, arguments, int(arguments.get("rows", 0)), time.perf_counter() - start)

    def run_recording(self: Recording, rows: int, decodes: int = 0, prompts: int = 0, end: int | None = None) -> None:
        for name, count in zip(COUNTS, (rows, decodes, prompts), strict=True):
            self._blocks[self._counts[name]] = count
        self._blocks[self._claimed] = 0
        launches = len(self._program) if end is None else end
        times = np.zeros((self._team, 2 * launches + 1), np.int64)
        start = time.perf_counter()
        launch(replay, self._team, program=self._program.ctypes.data, launches=launches, times=times.ctypes.data)
        whole = time.perf_counter() - start
        replayed.append((self._launches[:end], rows, times[:, 1::2] - times[:, :-1:2], whole))

    def run_blocks(original: Callable[..., None]) -> Callable[..., None]:
        def call(self: RowBlocks, *tensors: torch.Tensor) -> None:
            times = np.zeros((torch.get_num_threads(), len(self.launches)), np.int64)

            class Timed:
                run = staticmethod(lambda team, **given: launch(timed_blocks, team, times=times.ctypes.data, **given))

            with replaced(row_blocks, "run_blocks", lambda _: lambda: Timed):
                start = time.perf_counter()
                original(self, *tensors)
            replayed.append((self.launches, len(tensors[0]), times, time.perf_counter() - start))

        return call

    def timed(function: Callable[..., Any], passes: int) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            start = time.perf_counter()
            result = function(*arguments, **named)
            profile.passes += passes
            profile.in_passes += time.perf_counter() - start
            return result

        return call

    with (
        replaced(Lane, "start", lambda start: timed(start, 1)),
        replaced(Lane, "finish", lambda finish: timed(finish, 0)),
        replaced(Kernel, "run", lambda _: run),
        replaced(Recording, "run", lambda _: run_recording),
        replaced(RowBlocks, "run", run_blocks),
    ):
        yield
    for launches, rows, times, whole in replayed:
        spent = times.mean(0) * step
        profile.waiting += whole - spent.sum()
        for (kernel, block, *_), seconds in zip(launches, spent.tolist(), strict=True):
            arguments = dict(zip(kernel.fields, np.frombuffer(block, np.int64).tolist(), strict=True))
            profile.add(kernel, arguments, rows, seconds)


def run(engine: Engine, scenario: Scenario) -> float:
    """Seconds of the scenario, with an empty prefix cache."""
    engine.call("flush_cache")
    start = time.perf_counter()
    generate(engine, scenario.prompts, temperature=0.0, max_new_tokens=scenario.new_tokens, ignore_eos=True)
    return time.perf_counter() - start


def report(scenario: Scenario, profile: Profile) -> None:
    """A table: ms of a pass by kernel, its share, and what of it is above the floor of the machine."""
    total, passes = profile.total, profile.passes
    print(f"\n{scenario.name}: {passes} passes of {total / passes * 1e3:.2f} ms\n")
    print("| | ms of a pass | share | × the floor | ms above it |\n| --- | --- | --- | --- | --- |")
    for name, seconds, least in profile.rows():
        if abs(seconds / total) >= 0.005:
            floor = f"{seconds / least:.2f}" if least else ""
            above = (seconds - least) / passes * 1e3
            print(f"| {name} | {seconds / passes * 1e3:.2f} | {seconds / total:.1%} | {floor} | {above:.2f} |")


def profile_scenarios(
    folder: Path, dtype: str, threads: int, machine: Machine, scenarios: Sequence[Scenario], warm: Sequence[Scenario]
) -> None:
    """Print a table for each of ``scenarios``, after running ``warm``. ``machine``: its rates with ``threads``."""
    name_kernels()
    with Engine(str(folder), dtype=dtype, threads=threads) as engine:
        for scenario in warm:
            run(engine, scenario)
        for scenario in scenarios:
            profile = Profile(machine, dtype)
            with timing(profile):
                profile.total = run(engine, scenario)
            report(scenario, profile)
    print(
        f"\n{WAITING}: at the barriers between launches. {HOST}: the engine's Python and torch. "
        f"{OUTSIDE}: scheduling, messages and the front, which shares this process's lock here."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "model", nargs="?", default="demo:smollm2-135m-instruct", help="demo:NAME, random:NAME, a folder"
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 where the CPU has it")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--scale", type=float, default=1.0, help="factor on all lengths, for a trial run")
    options = parser.parse_args()
    dtype = options.dtype or ("bfloat16" if has_bfloat16() else "float32")
    torch.set_num_threads(options.threads)
    machine = measure()
    print(f"{options.model} in {dtype}, {options.threads} threads, load {os.getloadavg()[0]:.1f}")
    print(f"machine: copy {machine.bandwidth / 1e9:.1f} GB/s, {machine.gemm[dtype] / 1e9:.0f} GFLOP/s", flush=True)
    warm, scenarios = build(0, scale=0.1 * options.scale), build(1, scale=options.scale)
    profile_scenarios(folder_of(options.model), dtype, options.threads, machine, scenarios, warm)


if __name__ == "__main__":
    main()
