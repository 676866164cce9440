"""What each section of gpu_check.py gets: the device, a clock, its time limit, and a file for its records."""

from __future__ import annotations

import gc
import json
import math
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

FLUSH_BYTES = 1 << 30  # written before each measured call: beyond any L2 cache, and long enough to hide the launches
MOST_REPEATS, FEWEST_REPEATS = 50, 7
SECONDS_PER_MEASUREMENT = 0.25


class Stopwatch:
    """Measures calls: on a GPU by its own events with a cold L2 cache, elsewhere by the host's clock."""

    def __init__(self, device: torch.device) -> None:
        self.gpu = device.type == "cuda"
        self._flushed = torch.empty(FLUSH_BYTES if self.gpu else 1 << 10, dtype=torch.uint8, device=device)

    def seconds(self, function: Callable[[], object]) -> float:
        """The median time of a call on the device. It is called twice before."""
        if not self.gpu:
            return statistics.median(self._on_host(function) for _ in range(2))
        function()
        torch.cuda.synchronize()
        began = time.perf_counter()
        self._on_gpu(function, 1)
        once = time.perf_counter() - began
        repeats = max(FEWEST_REPEATS, min(MOST_REPEATS, int(SECONDS_PER_MEASUREMENT / once)))
        return statistics.median(self._on_gpu(function, repeats))

    def host_seconds(self, function: Callable[[], object]) -> float:
        """The median time that the host takes for a call, without waiting for the device's work."""
        function()
        times = []
        for _ in range(20 if self.gpu else 1):
            if self.gpu:
                torch.cuda.synchronize()
            times.append(self._on_host(function))
        return statistics.median(times)

    def _on_gpu(self, function: Callable[[], object], repeats: int) -> list[float]:
        starts, ends = _events(repeats), _events(repeats)
        for start, end in zip(starts, ends, strict=True):
            self._flushed.zero_()
            start.record()
            function()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1000 for start, end in zip(starts, ends, strict=True)]

    @staticmethod
    def _on_host(function: Callable[[], object]) -> float:
        began = time.perf_counter()
        function()
        return time.perf_counter() - began


def _events(count: int) -> list[Any]:
    """Marks in the order of the GPU's work, with their times."""
    return [torch.cuda.Event(enable_timing=True) for _ in range(count)]  # type: ignore[no-untyped-call]


@dataclass
class Context:
    """``bandwidth``: bytes per second of a copy, ``flops``: those of a bfloat16 product; NaN if they weren't
    measured.

    ``shard``: (number, count), the share of the section's work that this process does. ``small``: only a few cases.
    ``skip``: the number of attempts that a process before this one has made.
    """

    dry: bool
    records: Path
    ends: float  # time.monotonic() when the section must be finished
    bandwidth: float = math.nan
    flops: float = math.nan
    shard: tuple[int, int] = (0, 1)
    small: bool = False
    skip: int = 0

    def __post_init__(self) -> None:
        self.device = torch.device("cpu" if self.dry else "cuda")
        self._attempts = 0
        self._stopwatch: Stopwatch | None = None

    @property
    def stopwatch(self) -> Stopwatch:
        if self._stopwatch is None:
            self._stopwatch = Stopwatch(self.device)
        return self._stopwatch

    @property
    def left(self) -> float:
        """Seconds until the section must be finished."""
        return self.ends - time.monotonic()

    def pick(self, full: Any, tiny: Any) -> Any:
        """``full`` on a GPU, ``tiny`` in a dry run: sizes that take seconds in the interpreter."""
        return tiny if self.dry else full

    def row(self, table: str, **values: Any) -> None:
        """Report a row of a table; underscores in the names of columns are written as spaces."""
        named = {name.replace("_", " "): value for name, value in values.items()}
        self.record({"table": table, "row": named})

    def attempt(self, label: str, measure: Callable[..., None], *arguments: Any) -> None:
        """Call ``measure(self, *arguments)`` unless the time is up, and report an error if that fails.

        What it has allocated is freed. If the GPU can't be used any more by this process, another one does the rest.
        """
        self._attempts += 1
        if self._attempts <= self.skip:
            return
        if self.left < 0:
            self.record({"note": f"Left out, since the section's time was up: {label}."})
            return
        try:
            with torch.inference_mode():
                measure(self, *arguments)
        except Exception:  # of the compiler, the driver or the kernel
            self.record({"error": f"{label}:\n{traceback.format_exc()}"})
            if self.broken():
                self.restart()
        gc.collect()
        torch.cuda.empty_cache()

    def broken(self) -> bool:
        """Whether every use of the GPU fails from now on, as after an illegal address."""
        if self.device.type != "cuda":
            return False
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            return True
        return False

    def restart(self) -> None:
        """Leave the rest of the section to a new process, and end when it has ended."""
        self.record({"note": f"The GPU could not be used after attempt {self._attempts}: a new process continued."})
        options = ["--skip", str(self._attempts), "--seconds", str(self.left)]  # the last value of an option counts
        sys.exit(subprocess.call([sys.executable, "-m", "gpu.worker", *sys.argv[1:], *options]))

    def record(self, record: dict[str, Any]) -> None:
        """Append a record for :meth:`gpu.report.Report.add` to the file, at once."""
        with self.records.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
