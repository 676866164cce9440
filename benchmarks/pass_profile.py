"""Where the time of forward passes goes on the ``cpu`` backend, by kernel, beside what the machine allows.

``python benchmarks/pass_profile.py [MODEL]`` runs the four scenarios in process: once as served, for the time of a
pass, and once with each kernel timed alone, less the time of an empty launch. The rest is Python, torch, the barriers
between kernels, and waiting. Set ``GOMP_SPINCOUNT`` as the server does (docs/operations.md, "CPU threads").
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from checkpoints import folder_of
from floor import Machine, measure
from scenarios import Scenario, build

from trunkline.core import Engine
from trunkline.core.engine.lane import Lane
from trunkline.kernels.cpu.processor import has_bfloat16
from trunkline.kernels.cpu.recording import Recording
from trunkline.kernels.cpu.threads import Kernel, recorder
from trunkline.plugins.generation.offline import generate

_names: dict[int, str] = {}  # by the address of a kernel's code: the module that it is from


class Profile:
    """Seconds, launches and the least possible seconds by kernel, and the number of passes."""

    def __init__(self, machine: Machine, dtype: str) -> None:
        self.machine, self.dtype = machine, dtype
        self.seconds: dict[str, float] = {}
        self.least: dict[str, float] = {}
        self.passes = 0

    def add(self, kernel: Kernel, arguments: dict[str, Any], rows: int, seconds: float) -> None:
        """One launch over ``rows`` rows."""
        name, least = _names.get(kernel.address, "unknown"), 0.0
        if name == "gemm":
            size = arguments["inputs"] * arguments["outputs"]
            name = f"product {arguments['inputs']} × {arguments['outputs']}"
            # bfloat16 weights; see gemm.py.
            least = max(2 * size / self.machine.bandwidth, 2 * size * rows / self.machine.gemm[self.dtype])
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        self.least[name] = self.least.get(name, 0.0) + least


def name_kernels() -> None:
    """From now on, remember where each kernel is from."""
    original = Kernel.__init__

    def create(self: Kernel, body: Any, *rest: Any, **options: Any) -> None:
        original(self, body, *rest, **options)
        _names[self.address] = body.__module__.rsplit(".", 1)[-1]

    Kernel.__init__ = create  # type: ignore[method-assign]


@contextmanager
def counting(profile: Profile) -> Iterator[None]:
    """Count the passes."""
    original = Lane.start

    def start(self: Lane, *arguments: Any) -> Any:
        profile.passes += 1
        return original(self, *arguments)

    Lane.start = start  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        Lane.start = original  # type: ignore[method-assign]


@contextmanager
def timing(profile: Profile) -> Iterator[None]:
    """Time each launch; those of a recording are replayed one by one."""
    launch, replay = Kernel.run, Recording.run

    def run(self: Kernel, team: int, single: bool = False, /, **arguments: float) -> None:
        start = time.perf_counter()
        launch(self, team, single, **arguments)
        if recorder.recording is None:
            profile.add(self, arguments, int(arguments.get("rows", 0)), time.perf_counter() - start)

    def run_recording(self: Recording, rows: int, decodes: int = 0, prompts: int = 0, end: int | None = None) -> None:
        program, Kernel.run = self._program, launch  # type: ignore[method-assign]
        start = time.perf_counter()
        replay(self, rows, decodes, prompts, 0)
        nothing = time.perf_counter() - start
        for index, (kernel, block, _) in enumerate(self._launches[:end]):
            self._program = program[index : index + 1]
            start = time.perf_counter()
            replay(self, rows, decodes, prompts, 1)
            seconds = max(0.0, time.perf_counter() - start - nothing)
            arguments = dict(zip(kernel.fields, np.frombuffer(block, np.int64).tolist(), strict=True))
            profile.add(kernel, arguments, rows, seconds)
        self._program, Kernel.run = program, run  # type: ignore[method-assign]

    Kernel.run, Recording.run = run, run_recording  # type: ignore[method-assign]
    try:
        yield
    finally:
        Kernel.run, Recording.run = launch, replay  # type: ignore[method-assign]


def run(engine: Engine, scenario: Scenario) -> float:
    """Seconds of the scenario, with an empty prefix cache."""
    engine.call("flush_cache")
    start = time.perf_counter()
    generate(engine, scenario.prompts, temperature=0.0, max_new_tokens=scenario.new_tokens, ignore_eos=True)
    return time.perf_counter() - start


def report(scenario: Scenario, seconds: float, profile: Profile) -> None:
    """A table: ms of a pass by kernel, its share, and the least that the machine needs."""
    passes = profile.passes
    spent = dict(sorted(profile.seconds.items(), key=lambda item: -item[1]))
    print(f"\n{scenario.name}: {passes} passes of {seconds / passes * 1e3:.2f} ms\n")
    print("| kernel | ms of a pass | share | × the floor |\n| --- | --- | --- | --- |")
    for name, total in spent.items():
        if (share := total / seconds) >= 0.005:
            floor = f"{total / least:.2f}" if (least := profile.least[name]) else ""
            print(f"| {name} | {total / passes * 1e3:.2f} | {share:.1%} | {floor} |")
    rest = seconds - sum(spent.values())
    print(f"| the rest | {rest / passes * 1e3:.2f} | {rest / seconds:.1%} | |", flush=True)


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
    print(f"machine: copy {machine.bandwidth / 1e9:.1f} GB/s, {machine.gemm[dtype] / 1e9:.0f} GFLOP/s")
    name_kernels()
    with Engine(str(folder_of(options.model)), dtype=dtype, threads=options.threads) as engine:
        for warm in build(0, scale=0.1 * options.scale):
            run(engine, warm)
        for scenario in build(1, scale=options.scale):
            profile = Profile(machine, dtype)
            with counting(profile):
                seconds = run(engine, scenario)
            with timing(profile):
                run(engine, scenario)
            report(scenario, seconds, profile)


if __name__ == "__main__":
    main()
