"""Runs the gate in a process of its own, with the interpreter of the environment that has the wanted triton."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trunkline.core.model.sources.catalogue import cache_folder

from .rows import TARGETS, Row

_HERE = Path(__file__).resolve().parent
_ROOT = _HERE.parents[3]
_UNUSED = 30 * 86400.0  # seconds after which compiled kernels are removed


@dataclass(frozen=True, slots=True)
class Outcome:
    """``done`` of ``planned`` launches were compiled; fewer when the time was up."""

    rows: list[Row]
    done: int
    planned: int


def compile_launches(
    module: Path,
    targets: Sequence[str] = TARGETS,
    *,
    python: Path | None = None,
    seed: int | None = None,
    seconds: float = float("inf"),
) -> Outcome:
    """Compile what ``module`` launches for ``targets``, in a random order when there is a ``seed``.

    Stops after ``seconds``. Raises RuntimeError when the process fails.
    """
    with tempfile.TemporaryFile("w+") as errors:
        order = [] if seed is None else ["--seed", str(seed)]
        process = subprocess.Popen(
            [str(python or sys.executable), "-m", _HERE.name, str(module), *targets, *order],
            cwd=_HERE.parent,
            env=_environment(),
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        stopped = False
        try:
            output = process.communicate(timeout=None if seconds == float("inf") else seconds)[0]
        except subprocess.TimeoutExpired:
            stopped = True
            process.kill()
            output = process.communicate()[0]
        errors.seek(0)
        if process.returncode and not stopped:
            raise RuntimeError(f"the compile gate failed: {errors.read()[-4000:]}")
    return _outcome(output)


def _outcome(output: str) -> Outcome:
    """The rows of all launches that are complete."""
    rows: list[Row] = []
    pending: list[Row] = []
    done = planned = 0
    for line in output.splitlines():
        try:
            fields = json.loads(line)
        except ValueError:  # the line that was cut off
            break
        if "done" in fields:
            rows, pending = rows + pending, []
            done, planned = done + 1, fields["of"]
        else:
            pending.append(Row.from_json(fields))
    return Outcome(rows, done, planned)


def _environment() -> dict[str, str]:
    """Without the interpreter; ``trunkline`` is the source tree; compiled kernels are kept from run to run."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("TRITON_", "PYTHON"))}
    return {**kept, "PYTHONPATH": str(_ROOT / ".typing"), "TRITON_CACHE_DIR": str(_kernel_cache())}


def _kernel_cache() -> Path:
    folder = cache_folder() / "compiled-for-tests"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    for entry in folder.iterdir():
        if time.time() - entry.stat().st_mtime > _UNUSED:
            shutil.rmtree(entry, ignore_errors=True)
    return folder
