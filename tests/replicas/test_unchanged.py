"""The tests of the contract and of tasks, unchanged, against servers with two replicas of each model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

API = Path(__file__).parent.parent / "api"

pytestmark = pytest.mark.ray


@pytest.mark.parametrize("module", ["test_contract.py", "test_tasks.py"])
def test_as_on_one_server(module: str) -> None:
    # The suite's variables would leave out the ordinary tests.
    own = {name: value for name, value in os.environ.items() if not name.startswith("TRUNKLINE_SUITE")}
    command = [sys.executable, "-m", "pytest", "-q", str(API / module), "--timeout=1200", "-p", "no:cacheprovider"]
    done = subprocess.run(
        command, env=own | {"TRUNKLINE_TEST_FLAGS": "--replicas 2"}, capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == 0, done.stdout[-6000:]
    assert " passed" in done.stdout
