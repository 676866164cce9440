"""Benchmarks can start the server of another checkout, and notice when they would start this one's instead."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def server(repository: Path, load_script: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(repository / "benchmarks")  # type: ignore[no-untyped-call]
    return load_script("benchmarks/server.py")


def test_the_code_of_another_checkout_is_run(server: ModuleType, tmp_path: Path) -> None:
    package = tmp_path / ".typing" / "trunkline" / "core"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("WHO = 'the other one'\n")
    script = "from trunkline.core import WHO; from trunkline.kernels import layout; print(WHO)"
    said = subprocess.check_output([sys.executable, "-c", script], env=server.environment_of(tmp_path), text=True)
    assert said == "the other one\n"
    assert os.environ.get("PYTHONPATH") != str(tmp_path / ".typing")


def test_a_folder_without_code_is_refused(server: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is no checkout of trunkline"):
        server.environment_of(tmp_path)
