"""compute-sanitizer over a few parity checks: accesses out of bounds, and races in shared memory."""

from __future__ import annotations

import os
import shutil
import site
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from gpu.context import Context

NAME = "compute-sanitizer"
TOOLS = ("memcheck", "racecheck")
SUMMARY = "========="  # begins the tool's own lines
LINES = 12  # of the tool's output that the report quotes
FAILURES = 9  # exit status when the tool has found something
DRY_COMMAND = ["env"]  # in a dry run, in place of the tool: it only runs what follows


def run(context: Context) -> None:
    """Report a row for each tool, or that there is none."""
    path = find()
    context.record({"note": f"{NAME}: {path or 'not found in PATH, CUDA_HOME and the wheels of nvidia'}"})
    if path is None and not context.dry:
        return
    for number, tool in enumerate(TOOLS):
        seconds = context.left / (len(TOOLS) - number) - 2
        check(context, str(path), tool, seconds)


def check(context: Context, path: str, tool: str, seconds: float) -> None:
    """Run the small parity section under the tool; its rows go to a file of its own."""
    records = context.records.with_suffix(f".{tool}")
    prefix = DRY_COMMAND if context.dry else [path, "--tool", tool, "--error-exitcode", str(FAILURES)]
    worker = [sys.executable, "-m", "gpu.worker", "gpu.parity.run", "--small"]
    worker += ["--records", str(records), *(["--dry-run"] if context.dry else [])]
    # torch's allocator would hide accesses beyond a tensor, within the same large block.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(
            [*prefix, *worker], env=environment, capture_output=True, text=True, errors="replace", timeout=seconds
        )
    except subprocess.TimeoutExpired:
        context.row(NAME, tool=tool, checks=checks_in(records), result=f"no result after {seconds:.0f} s")
        return
    said = [line for line in done.stdout.splitlines() if line.startswith(SUMMARY)]
    context.row(NAME, tool=tool, checks=checks_in(records), result=said[-1] if said else f"status {done.returncode}")
    if done.returncode:
        text = "\n".join(said[:LINES]) or done.stderr[-2000:]
        context.record({"error": f"{tool}, exit status {done.returncode}:\n{text}"})


def checks_in(records: Path) -> int:
    """The number of records in a file, 0 if there is none."""
    return len(records.read_text(encoding="utf-8").splitlines()) if records.exists() else 0


def find() -> Path | None:
    """The tool's path; None if it isn't installed."""
    return next((path for path in places() if path.is_file() and os.access(path, os.X_OK)), None)


def places() -> Iterator[Path]:
    """Where the tool may be, the likeliest place first."""
    if found := shutil.which(NAME):
        yield Path(found)
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if home := os.environ.get(variable):
            yield from (Path(home, "bin", NAME), Path(home, NAME, NAME))
    yield from (Path("/usr/local/cuda/bin", NAME), Path("/usr/local/cuda", NAME, NAME))
    for packages in site.getsitepackages():
        yield from sorted(Path(packages, "nvidia").rglob(NAME))
