"""Checks and measures everything that runs on a GPU, for one that is available for a quarter of an hour only.

``python benchmarks/gpu_check.py`` compares every Triton kernel with its reference, measures the kernels and the whole
engine, and writes ``benchmarks/results/gpu-NAME.md``. The most important sections come first. The report is written
again whenever something was measured, so that nothing is lost if the run is cut off; a section that fails, hangs or
breaks the GPU's context ends alone. ``--dry-run`` runs the same code on a CPU, with tiny sizes, in Triton's
interpreter, and writes to a temporary folder.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu.report import Report

HERE = Path(__file__).parent
GRACE = 15.0  # seconds after its limit until a section is killed
POLL = 0.5  # seconds
MOST_SHARDS = 8
ERROR_LINES = 40  # of a failed process's output


@dataclass(frozen=True, slots=True)
class Work:
    """A section: its function (see gpu/worker.py), and a limit in seconds. ``divided``: among several processes, since
    most of its time is compilation on the host."""

    function: str
    title: str
    seconds: float
    divided: bool = False


SECTIONS = {
    "machine": Work("gpu.machine.run", "Machine", 40),
    "parity": Work("gpu.parity.run", "Kernels against their references", 190, divided=True),
    "attention": Work("gpu.attention.run", "Time of attention", 110),
    "operations": Work("gpu.operations.run", "Time of the other kernels", 80),
    "dense": Work("gpu.engine.dense", "Engine: 8B-shaped dense model", 170),
    "sanitizer": Work("gpu.sanitizer.run", "compute-sanitizer", 80),
    "moe": Work("gpu.engine.mixture", "Engine: mixture of experts", 110),
    "embedding": Work("gpu.engine.embedding", "Engine: embeddings", 60),
}
FIRST = "machine"


class Process:
    """A worker process, and what it has recorded so far."""

    def __init__(self, arguments: list[str], folder: Path, name: str) -> None:
        self._records, self._log, self._read = folder / f"{name}.jsonl", folder / f"{name}.log", 0
        self.killed = False
        self._records.touch()
        command = [sys.executable, "-m", "gpu.worker", *arguments, "--records", str(self._records.absolute())]
        with self._log.open("w") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, cwd=HERE)

    def new_records(self) -> list[dict[str, Any]]:
        """The records since the last call; a line that is still being written isn't read."""
        with self._records.open(encoding="utf-8") as file:
            file.seek(self._read)
            text = file.read()
        whole = text[: text.rfind("\n") + 1]
        self._read += len(whole.encode())
        return [json.loads(line) for line in whole.splitlines()]

    @property
    def runs(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        """End it, if it runs, and the processes that it has started."""
        self.killed |= self.runs
        with contextlib.suppress(ProcessLookupError):  # none of its processes is left
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def error(self) -> str:
        """Why the process failed, "" if it didn't."""
        status = self._process.returncode
        if status == 0:
            return ""
        if self.killed:
            return "It didn't end in time and was killed; what is above was measured before."
        lines = self._log.read_text(errors="replace").splitlines()[-ERROR_LINES:]
        return "\n".join([*lines, f"exit status {status}"])


class Check:
    """One run of all sections."""

    def __init__(self, folder: Path, minutes: float, *, dry: bool) -> None:
        self.report, self._folder, self._dry = Report(dry=dry), folder, dry
        self._ends = time.monotonic() + 60 * minutes
        self._rates: dict[str, float] = {}  # "bandwidth" and "flops" of the section "machine"
        self._path: Path | None = None

    @property
    def left(self) -> float:
        """Seconds of the whole budget that are left."""
        return self._ends - time.monotonic()

    def section(self, name: str, work: Work) -> None:
        """Run a section to its end, or until its time is up."""
        self.report.begin(name, work.title)
        seconds = min(work.seconds, self.left)
        if seconds < GRACE:
            self.report.end(name, "not run: no time was left")
            self.write()
            return
        began = time.monotonic()
        self._say(f"{work.title}, at most {seconds:.0f} s")
        with tempfile.TemporaryDirectory() as folder:
            processes = self._start(name, work, seconds, Path(folder))
            try:
                self._follow(name, processes, began + seconds + GRACE)
            finally:
                for process in processes:
                    process.kill()
            errors = [error for process in processes if (error := process.error())]
        state = "killed" if any(process.killed for process in processes) else "failed" if errors else "done"
        state += f" after {time.monotonic() - began:.0f} s"
        self.report.end(name, state, "\n\n".join(dict.fromkeys(errors)))
        self._say(f"{work.title}: {state}")
        self.write()

    def _start(self, name: str, work: Work, seconds: float, folder: Path) -> list[Process]:
        count = min(MOST_SHARDS, os.cpu_count() or 1) if work.divided and not self._dry else 1
        arguments = [work.function, "--seconds", str(seconds)]
        arguments += [part for rate, value in self._rates.items() for part in (f"--{rate}", str(value))]
        arguments += ["--dry-run"] if self._dry else []
        shards = [[*arguments, "--shard", str(number), str(count)] for number in range(count)]
        return [Process(shard, folder, f"{name}-{number}") for number, shard in enumerate(shards)]

    def _follow(self, name: str, processes: list[Process], deadline: float) -> None:
        """Read what the processes record until they have ended; kill them at the deadline."""
        running = True
        while running:
            running = any(process.runs for process in processes)
            records = [record for process in processes for record in process.new_records()]
            for record in records:
                self._add(name, record)
            if records:
                self.write()
            if time.monotonic() > deadline:
                for process in processes:
                    process.kill()
            elif running:
                time.sleep(POLL)

    def _add(self, name: str, record: dict[str, Any]) -> None:
        self.report.add(name, record)
        self._rates |= {rate: record[rate] for rate in ("bandwidth", "flops") if rate in record}
        cells = [f"{column} {self.report.cell(value)}" for column, value in record.get("row", {}).items()]
        cells += [f"{column} {self.report.cell(value)}" for column, value in record.get("facts", {}).items()]
        cells += [record[kind] for kind in ("note", "error") if kind in record]
        self._say(f"  {', '.join(cells)}")

    def _say(self, text: str) -> None:
        print(f"[{self.left:4.0f} s left] {text}", flush=True)

    def write(self) -> Path:
        """Write the report; its name changes when the GPU's becomes known."""
        former, self._path = self._path, self._folder / self.report.file_name()
        self.report.write(self._path)
        if former not in (None, self._path):
            former.unlink(missing_ok=True)
        return self._path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=14.0, help="time limit for all sections together")
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), help="only these sections, after the first")
    parser.add_argument("--out", type=Path, help="folder for the report, by default benchmarks/results")
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, with tiny sizes, into a temporary folder")
    options = parser.parse_args()
    default = Path(tempfile.mkdtemp(prefix="gpu-check-")) if options.dry_run else HERE / "results"
    check = Check(options.out or default, options.minutes, dry=options.dry_run)
    for name, work in SECTIONS.items():
        if name == FIRST or not options.only or name in options.only:
            check.section(name, work)
        if name == FIRST and not check.report.facts:
            break  # there is no GPU
    print(f"report: {check.write()}")
    if check.report.failed:
        print(f"failed: {', '.join(check.report.failed)}")
        sys.exit(1)


if __name__ == "__main__":
    main()
