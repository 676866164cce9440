"""Environments of the suites: what they see, that they are kept, and what happens when one can't be had."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def environments(
    load_script: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> ModuleType:
    """With an empty cache folder, and a pip that asks no index."""
    monkeypatch.setenv("TRUNKLINE_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    return load_script("tests/environments.py")


def test_it_sees_our_packages_and_is_kept(environments: ModuleType, tmp_path: Path) -> None:
    wanted = environments.Environment("some", requirements=("numpy",))
    python = environments.python_of(wanted)
    script = "import sys, torch, numpy; print(sys.prefix)"
    assert subprocess.check_output([python, "-c", script], text=True).strip() == str(python.parents[1])
    assert subprocess.run([python, "-c", "import trunkline.core"], capture_output=True).returncode != 0
    made = (python.parents[1] / "constraints.txt").stat().st_mtime_ns
    assert environments.python_of(wanted) == python
    assert (python.parents[1] / "constraints.txt").stat().st_mtime_ns == made
    assert (tmp_path / "environments").stat().st_mode & 0o777 == 0o700


def test_one_that_cannot_be_had_says_why_each_time(environments: ModuleType, tmp_path: Path) -> None:
    for _ in range(2):  # what the first try left is no environment
        with pytest.raises(environments.Unavailable, match=r"^odd can't be installed: .*no-such-package"):
            environments.python_of(environments.Environment("odd", requirements=("no-such-package",)))


def test_those_that_nobody_uses_are_removed(environments: ModuleType, tmp_path: Path) -> None:
    month = time.time() - 31 * 86400
    for name, age in (("some-old", month), ("some-recent", None), ("some-unfinished", None), ("someone-old", month)):
        folder = tmp_path / "environments" / name
        folder.mkdir(parents=True)
        if "unfinished" not in name:
            (folder / "complete").touch()
        if age is not None:
            os.utime(folder / "complete", (age, age))
    python = environments.python_of(environments.Environment("some", requirements=()))
    left = {path.name for path in (tmp_path / "environments").iterdir() if path.is_dir()}
    assert left == {"some-recent", "someone-old", python.parents[1].name}
