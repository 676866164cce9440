"""The check of GPUs: its report, its processes, and a whole dry run."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

SCRIPT = "benchmarks/gpu_check.py"


@pytest.fixture
def script(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script(SCRIPT)


# -- the report ------------------------------------------------------------------------------


def report(*, dry: bool = False) -> Any:
    made = import_module("gpu.report").Report(dry=dry)
    made.begin("one", "One")
    return made


def test_a_table_has_the_columns_of_all_rows() -> None:
    made = report()
    made.add("one", {"table": "T", "row": {"a": 0.0, "b": True}})
    made.add("one", {"table": "T", "row": {"a": 0.00001234, "c": None, "b": False}})
    text = made.markdown()
    assert "| a | b | c |\n|---|---|---|\n| 0 | yes | - |\n| 1.23e-05 | **no** | - |" in text
    assert "| One | running | 1 |" in text
    assert not made.failed


def test_every_figure_of_a_dry_run_is_marked() -> None:
    made = report(dry=True)
    made.add("one", {"table": "T", "row": {"rows": 64, "measured": 12.3456}})
    made.add("one", {"facts": {"GPU": "none", "speed": 1234.5}})
    text = made.markdown()
    assert "| 64 | 12.3 (dry run) |" in text
    assert "* speed: 1234 (dry run)" in text
    assert "(dry run)" in text.splitlines()[0]


def test_the_file_is_named_after_the_gpu() -> None:
    made = report()
    assert made.file_name() == "gpu-unknown.md"
    made.add("one", {"facts": {"GPU": "NVIDIA H100 80GB HBM3 / (SXM)"}})
    assert made.file_name() == "gpu-nvidia-h100-80gb-hbm3-sxm.md"


# -- its processes ---------------------------------------------------------------------------

MODULE = """
import os, signal, time

def good(context):
    context.row("Good", number=1)

def raises(context):
    context.row("Before", number=2)
    raise ValueError("it went wrong")

def crashes(context):
    os.kill(os.getpid(), signal.SIGSEGV)

def hangs(context):
    context.row("Hanging", number=3)
    time.sleep(600)
"""


@pytest.mark.compile
def test_a_section_that_fails_crashes_or_hangs_ends_alone(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sections.py").write_text(MODULE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(script, "GRACE", 0.0)
    check = script.Check(tmp_path / "out", 10, dry=True)
    for name in ("raises", "crashes", "hangs", "good"):
        check.section(name, script.Work(f"sections.{name}", name.title(), 10 if name == "hangs" else 60))
    text = check.write().read_text()
    assert check.report.failed == ["Raises", "Crashes", "Hangs"]
    assert "ValueError: it went wrong" in text
    assert "exit status -11" in text
    assert "| Hangs | killed after 10 s | 0 |" in text
    assert all(f"| number |\n|---|\n| {number} |" in text for number in (1, 2, 3)), "what was measured stays"


def test_without_time_nothing_is_started(script: ModuleType, tmp_path: Path) -> None:
    check = script.Check(tmp_path, 0.1, dry=True)
    check.section("one", script.Work("no_such_module", "One", 60))
    assert "| One | not run: no time was left | 0 |" in check.write().read_text()


def test_without_a_gpu_it_says_so(tmp_path: Path, repository: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    command = [sys.executable, str(repository / SCRIPT), "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "failed: Machine" in done.stdout
    assert "Time of attention" not in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["gpu-unknown.md"]


@pytest.mark.compile
def test_the_whole_dry_run(tmp_path: Path, repository: Path) -> None:
    """Every section, each in its process."""
    command = [sys.executable, str(repository / SCRIPT), "--dry-run", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-3000:]
    (path,) = tmp_path.iterdir()
    assert "nan (dry run)" not in path.read_text(), "measured rates reach all sections"
    summary = path.read_text().partition("\n## ")[0].partition("|---|---|---|\n")[2]
    states = [line.split(" | ")[1:] for line in summary.splitlines()]
    assert len(states) == 8
    assert all(state.startswith("done") and bad == "0 |" for state, bad in states)
