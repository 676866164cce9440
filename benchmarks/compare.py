"""One command, one table: trunkline, transformers and the machine's floor on the same model and dtype.

``python benchmarks/compare.py [MODEL]`` starts the server and the baseline itself, in processes of
their own with equally many threads, and runs them in turns so that both meet the same neighbours.
With ``--against FOLDER``, another checkout of trunkline (``git worktree add FOLDER COMMIT``), the baseline is
the server of that checkout: what a change costs those who don't use what it adds. With ``--with-flags="FLAGS"``, the
baseline is the same server without these flags: what an option costs (docs/determinism.md). At the end, without these
options, where the time above the floor goes, by kernel (pass_profile.py).
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import msgspec
import torch
from bench_serving import describe, flush, median, run
from floor import Machine, Shape, best, floor, measure
from pass_profile import profile_scenarios
from scenarios import Result, Scenario, build
from server import running

from trunkline.core.model.sources import DEMO
from trunkline.core.model.sources.catalogue import fetch
from trunkline.kernels.cpu.processor import has_bfloat16

_Runs = dict[str, list[Result]]


class Pipe:
    """transformers_baseline.py in a process of its own."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._stdin, self._stdout = process.stdin, process.stdout
        self._line()  # "ready"

    def run(self, scenario: Scenario) -> Result:
        self._stdin.write(msgspec.json.encode(scenario).decode() + "\n")
        self._stdin.flush()
        return msgspec.json.decode(self._line(), type=Result)

    def _line(self) -> str:
        line = self._stdout.readline()
        if not line:
            raise RuntimeError("the transformers baseline died; its output is above")
        return line


@contextmanager
def baseline(folder: Path, dtype: str, threads: int) -> Iterator[Pipe]:
    """The baseline on ``threads`` threads, loaded and ready."""
    command = [sys.executable, str(Path(__file__).with_name("transformers_baseline.py")), str(folder)]
    command += ["--pipe", "--dtype", dtype]
    quiet = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    environment = {**os.environ, **quiet, "OMP_NUM_THREADS": str(threads)}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            yield Pipe(process)
        finally:
            process.kill()


_Side = Callable[[Scenario], Awaitable[Result]]


@asynccontextmanager
async def server(
    options: argparse.Namespace, dtype: str, flags: Sequence[str] = (), source: Path | None = None
) -> AsyncIterator[_Side]:
    """A function that puts a trunkline server, started for it with ``flags``, under a scenario.

    ``source`` is its checkout.
    """
    every = ["--dtype", dtype, "--threads", str(options.threads), *flags]
    async with running(options.model, every, source=source) as url:

        async def side(scenario: Scenario) -> Result:
            await flush(url)
            return await run(url, scenario)

        yield side


@asynccontextmanager
async def other(options: argparse.Namespace, folder: Path, dtype: str) -> AsyncIterator[_Side]:
    """The same for what trunkline is compared with: a server without flags, another checkout, or transformers."""
    if options.against is not None or options.with_flags:
        async with server(options, dtype, source=options.against) as side:
            yield side
        return
    with baseline(folder, dtype, options.threads) as pipe:
        yield lambda scenario: asyncio.to_thread(pipe.run, scenario)


async def measure_both(options: argparse.Namespace, folder: Path, dtype: str) -> tuple[_Runs, _Runs, Machine]:
    """Runs by scenario of trunkline and of the other side, and the best rates seen between them."""
    ours: _Runs = {}
    theirs: _Runs = {}
    machines: list[Machine] = []
    flags = options.with_flags.split()
    async with server(options, dtype, flags) as mine, other(options, folder, dtype) as yours:
        for scenario in build(0, scale=0.1 * options.scale):
            await mine(scenario)
            await yours(scenario)
        for seed in range(1, options.rounds + 1):
            machines.append(measure())
            for scenario in chosen(seed, options):
                turns = [(ours, mine), (theirs, yours)]
                for runs, side in turns if seed % 2 else reversed(turns):
                    runs.setdefault(scenario.name, []).append(await side(scenario))
                print(f"round {seed}: {scenario.name} {_ratio(ours, theirs, scenario.name, -1):.2f} ×", flush=True)
    return ours, theirs, best(machines)


def chosen(seed: int, options: argparse.Namespace) -> list[Scenario]:
    """The scenarios that ``--only`` leaves."""
    every = build(seed, scale=options.scale)
    return [each for each in every if not options.only or any(part in each.name for part in options.only)]


def _ratio(ours: _Runs, theirs: _Runs, name: str, index: int) -> float:
    return theirs[name][index].wall / ours[name][index].wall


def agreement(ours: list[Result], theirs: list[Result]) -> float:
    """Share of requests whose output ids are the same on both sides."""
    pairs = [
        pair for mine, other in zip(ours, theirs, strict=True) for pair in zip(mine.outputs, other.outputs, strict=True)
    ]
    return sum(mine == other for mine, other in pairs) / len(pairs)


def report(scenario: Scenario, ours: _Runs, theirs: _Runs, least: float, against: str) -> None:
    """Three lines a scenario. Ratios are of wall times: the median over the rounds, and of each side's fastest run."""
    name = scenario.name
    mine, yours = median(ours[name]), median(theirs[name])
    ratio = statistics.median(_ratio(ours, theirs, name, index) for index in range(len(ours[name])))
    fastest = min(each.wall for each in theirs[name]) / min(each.wall for each in ours[name])
    print(f"\n{name}")
    print(f"  {'trunkline':12s}  {describe(scenario, mine)}")
    print(f"  {against:12s}  {describe(scenario, yours)}")
    print(
        f"  {ratio:.2f} × {against} (fastest {fastest:.2f}); {mine.wall / least:.2f} × the floor of {least:.2f} s; "
        f"same output ids in {agreement(ours[name], theirs[name]):.0%} of requests"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo:smollm2-135m-instruct", help="demo:NAME or a local folder")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 where the CPU has it")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of each side; default all cores")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0, help="factor on all lengths, for a trial run")
    parser.add_argument("--against", type=Path, metavar="FOLDER", help="compare with this checkout of trunkline")
    parser.add_argument("--with-flags", default="", metavar="FLAGS", help="compare with the server without these flags")
    parser.add_argument("--only", action="append", default=[], help="scenarios whose name contains this; repeatable")
    options = parser.parse_args()
    dtype = options.dtype or ("bfloat16" if has_bfloat16() else "float32")
    folder = fetch(options.model) if options.model.startswith(DEMO) else Path(options.model)
    torch.set_num_threads(options.threads)
    if (load := os.getloadavg()[0]) > 0.5:
        print(f"The machine is busy (load {load:.1f}): times will be worse than it could, ratios unsteady.")
    ours, theirs, machine = asyncio.run(measure_both(options, folder, dtype))
    rates = ", ".join(f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in machine.gemm.items())
    print(f"\n{options.model} in {dtype}, {options.threads} threads, medians of {options.rounds} rounds")
    print(f"machine: copy {machine.bandwidth / 1e9:.1f} GB/s; {rates}")
    shape = Shape.read(folder)
    for scenario in chosen(1, options):
        against = options.against.name if options.against else "without" if options.with_flags else "transformers"
        report(scenario, ours, theirs, floor(scenario, shape, machine, dtype), against)
    if options.against is None and not options.with_flags:
        warm = build(0, scale=0.1 * options.scale)
        profile_scenarios(folder, dtype, options.threads, machine, chosen(options.rounds + 1, options), warm)


if __name__ == "__main__":
    main()
