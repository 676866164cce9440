"""The slow suites: what is declared, and what their runner reports."""

from __future__ import annotations

import ast
import datetime
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

PROJECT = """
[tool.pytest.ini_options]
testpaths = ["tests"]

[tool.trunkline.suites]
good = { minutes = 5, about = "passes" }
bad = { minutes = 5, about = "has a test that fails" }
long = { minutes = 0.05, about = "takes longer than its budget" }
absent = { minutes = 5, about = "lacks what it needs" }
"""

TESTS = """
import time
import pytest

def test_ordinary(): pass

@pytest.mark.good
def test_good(suite): suite.notes.append(f"seed {suite.seed}")

@pytest.mark.bad
@pytest.mark.parametrize("wrong", [False, True])
def test_bad(wrong): assert not wrong

@pytest.mark.long
@pytest.mark.parametrize("turn", range(3))
def test_long(turn): time.sleep(60 if turn else 0)

@pytest.mark.absent
def test_absent(): pytest.skip("no browser is installed")
"""


@pytest.fixture
def suites(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("tests/suites.py")


@pytest.fixture
def project(suites: ModuleType, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with four small suites and our conftest.py, which the runner takes for ours."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "pyproject.toml").write_text(PROJECT)
    (tmp_path / "tests" / "test_some.py").write_text(TESTS)
    shutil.copy(repository / "tests" / "conftest.py", tmp_path / "tests")
    monkeypatch.setattr(suites, "ROOT", tmp_path)
    return tmp_path


def rows(summary: str) -> dict[str, list[str]]:
    lines = [[cell.strip() for cell in line.strip("| ").split("|")] for line in summary.splitlines() if "|" in line]
    return {name: rest for name, *rest in lines[2:]}


def test_budgets_leave_time_for_the_ordinary_tests(suites: ModuleType) -> None:
    """Continuous integration has 90 minutes, 15 of which are those of `make test`."""
    assert sum(suite["minutes"] for suite in suites.declared().values()) <= 60


def test_every_suite_has_tests(suites: ModuleType, repository: Path) -> None:
    marks = {
        node.attr
        for path in (repository / "tests").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pytest.mark"
    }
    assert suites.declared().keys() - marks == set()


def test_the_order_begins_with_another_suite_each_day(suites: ModuleType) -> None:
    names = ["a", "b", "c"]
    days = [datetime.date(2026, 1, 1) + datetime.timedelta(days=day) for day in range(3)]
    orders = [suites.rotated(names, day) for day in days]
    assert {order[0] for order in orders} == set(names)
    assert all(sorted(order) == names for order in orders)


def test_the_summary_says_what_ran_and_what_did_not(
    suites: ModuleType, project: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    written = project / "summary.md"
    assert suites.main(["--seed", "7", "--write", str(written)]) == 1, "a suite failed"
    summary = rows(written.read_text())
    assert summary == rows(capfd.readouterr().out.rpartition("\nseed 7\n")[2])
    outcomes = {name: (row[0].partition(" (")[0], row[1]) for name, row in summary.items()}
    assert outcomes["good"] == ("passed", "1 of 1")
    assert outcomes["bad"] == ("failed", "2 of 2")
    assert outcomes["absent"] == ("skipped", "0 of 1")
    assert outcomes["long"][0] == "cut off"
    assert summary["good"][2] == "seed 7"
    assert summary["absent"][2] == "1 skipped: no browser is installed"


def test_suites_without_time_are_listed_as_not_run(
    suites: ModuleType, project: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert suites.main(["--seconds", "30"]) == 0
    outcomes = {name: row[0] for name, row in rows(capfd.readouterr().out).items()}
    assert outcomes == dict.fromkeys(["good", "bad", "long", "absent"], "not run (0 s)")


def test_an_unknown_suite_is_refused(suites: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        suites.main(["nosuch"])
    assert "no suite nosuch; there are:" in capsys.readouterr().err
