"""Runs the slow test suites, each within its budget, and reports what ran and what did not.

The suites are declared in pyproject.toml (``[tool.trunkline.suites]``): a marker, a budget in minutes, a
description. ``python tests/suites.py`` runs all of them in an order that rotates by date, so that a short
``--seconds`` doesn't always leave out the same ones. ``--full`` removes every limit.

Exit status 1 when a test failed or a suite could not be run; a suite that was cut off or left out for lack of
time is reported and doesn't change the status.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SEED, SECONDS, REPORT = "TRUNKLINE_SUITE_SEED", "TRUNKLINE_SUITE_SECONDS", "TRUNKLINE_SUITE_REPORT"
GRACE = 60.0  # seconds between the interrupt and the kill of a suite that is over its budget
LEAST = 60.0  # seconds; with less than this left no further suite is started


@dataclass(frozen=True)
class Result:
    """What happened to one suite. ``report`` holds pytest's counts, see conftest.py; {} when it never ran."""

    name: str
    outcome: str  # passed, failed, cut off, skipped, not run
    seconds: float
    report: dict[str, Any]

    @property
    def row(self) -> tuple[str, str, str, str]:
        report = self.report
        ran = f"{report.get('passed', 0) + report.get('failed', 0)} of {report['collected']}" if report else "-"
        notes = [f"{report['skipped']} skipped: {'; '.join(report['reasons'])}"] if report.get("skipped") else []
        notes += report.get("notes", [])
        return self.name, f"{self.outcome} ({self.seconds:.0f} s)", ran, "; ".join(notes)


def declared() -> dict[str, dict[str, Any]]:
    """Suite name -> {"minutes": budget, "about": description}, as pyproject.toml has them."""
    suites: dict[str, dict[str, Any]] = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["trunkline"][
        "suites"
    ]
    return suites


def rotated(names: Sequence[str], day: datetime.date) -> list[str]:
    """The names in their order, beginning with another one each day."""
    first = day.toordinal() % max(1, len(names))
    return [*names[first:], *names[:first]]


def run(name: str, seconds: float | None, seed: int) -> Result:
    """Run one suite in a pytest process of its own, for at most ``seconds`` (None: no limit)."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        limit = {} if seconds is None else {SECONDS: f"{seconds:.0f}"}
        environment = {**os.environ, **limit, SEED: str(seed), REPORT: str(report)}
        command = [sys.executable, "-m", "pytest", "--suite", name, "--timeout=7200", "--durations=5"]
        began = time.monotonic()
        process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
        cut = False
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            cut = True
            status = stop(process)
        took = time.monotonic() - began
        counts = json.loads(report.read_text()) if report.is_file() else {}
    if counts.get("failed") or (status != 0 and not cut):
        return Result(name, "failed", took, counts)
    if cut or counts.get("stopped"):
        return Result(name, "cut off", took, counts)
    return Result(name, "passed" if counts["passed"] else "skipped", took, counts)


def stop(process: subprocess.Popen[bytes]) -> int:
    """Interrupt a suite, and kill its process group if that doesn't end it.

    Only pytest is interrupted: a server that ended before its test would make the test fail.
    """
    process.send_signal(signal.SIGINT)
    try:
        return process.wait(GRACE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.wait()


def table(results: Sequence[Result], seed: int) -> str:
    """The summary as a Markdown table."""
    rows = [("suite", "outcome", "tests that ran", "notes"), ("---",) * 4, *(result.row for result in results)]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([f"seed {seed}", "", *lines])


def main(arguments: Sequence[str]) -> int:
    suites = declared()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"suites to run; default all: {', '.join(suites)}")
    parser.add_argument("--seconds", type=float, help="limit for all suites together")
    parser.add_argument("--full", action="store_true", help="no limits; samples become whole sets")
    parser.add_argument("--write", type=Path, help="also write the summary to this file")
    parser.add_argument("--seed", type=int, help="seed of samples; default today's date")
    options = parser.parse_args(arguments)
    if unknown := set(options.names) - suites.keys():
        parser.error(f"no suite {', '.join(sorted(unknown))}; there are: {', '.join(suites)}")
    today = datetime.date.today()
    seed = today.toordinal() if options.seed is None else options.seed
    began, results = time.monotonic(), []
    for name in options.names or rotated(list(suites), today):
        left = float("inf") if options.seconds is None else options.seconds - (time.monotonic() - began)
        if left < LEAST:
            results.append(Result(name, "not run", 0.0, {}))
            continue
        limit = None if options.full else min(left, 60.0 * suites[name]["minutes"])
        print(f"\n== suite {name}: {suites[name]['about']} (seed {seed}) ==", flush=True)
        results.append(run(name, limit, seed))
    summary = table(results, seed)
    print(f"\n{summary}")
    if options.write:
        options.write.write_text(f"# Slow suites, {today}\n\n{platform.processor() or platform.machine()}, {summary}\n")
    return int(any(result.outcome == "failed" for result in results))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
