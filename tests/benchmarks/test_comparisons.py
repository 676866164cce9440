"""The scripts that compare and profile whole servers run, on lengths of a few tokens."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

SMOLLM2 = "demo:smollm2-135m-instruct"
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
START = "from trunkline.core.cli import main; main()"
OURS = f"exec {sys.executable} -c '{START}' serve {{model}} --port {{port}} --dtype {{dtype}}"

pytestmark = [pytest.mark.demo, pytest.mark.timeout(600)]


def output_of(script: str, *arguments: str) -> str:
    command = [sys.executable, str(BENCHMARKS / script), *arguments, "--dtype", "float32"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_side_by_side_with_ourselves() -> None:
    rows = output_of("side_by_side.py", "--peer", OURS, "--model", SMOLLM2, "--rounds", "1", "--scale", "0.02")
    found = re.findall(r"^\| demo:\S+ \| (.+?) \| [\d.]+ \| [\d.]+ \| ([\d.]+) ", rows, re.MULTILINE)
    assert [name for name, _ in found] == [
        "single 128→128",
        "32 × 128→128",
        "8 × 1024 prefill",
        "32 × shared 1024",
    ]
    assert all(0.01 < float(ratio) < 100 for _, ratio in found)


def test_side_by_side_with_a_peer_that_does_not_start() -> None:
    command = [sys.executable, str(BENCHMARKS / "side_by_side.py"), "--peer", "echo broken; exit 3", "--model", SMOLLM2]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 1
    assert "the peer did not start:\nbroken" in done.stderr


def test_profile_of_passes() -> None:
    tables = output_of("pass_profile.py", "--scale", "0.02")
    assert tables.count(" passes of ") == 4
    for kernel in ("product 576 × 3072", "product 1536 × 576"):
        assert tables.count(f"| {kernel} |") == 4
    shares = re.findall(r"^\| .+? \| [-\d.]+ \| ([-\d.]+)% \|", tables, re.MULTILINE)
    # All rows add up to the whole, but for those below half a percent.
    assert sum(map(float, shares)) == pytest.approx(400, abs=40)
