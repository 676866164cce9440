"""Servers with replicas on Ray, in an environment that has it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest

TESTS = Path(__file__).parent.parent
RAY = ("ray[serve]>=2.60,<2.61",)
WAIT = 30  # seconds in which Ray's processes end


@pytest.fixture(scope="session")
def python(load_script: Callable[[str], ModuleType]) -> Path:
    """An interpreter that has Ray."""
    environments = load_script("tests/environments.py")
    try:
        found: Path = environments.python_of(environments.Environment("ray", requirements=RAY))
    except environments.Unavailable as error:
        pytest.skip(str(error))
    return found


@pytest.fixture(scope="session", autouse=True)
def surroundings(python: Path) -> Iterator[dict[str, str]]:
    """The environment variables of servers on Ray."""
    own = {
        "PYTHONPATH": str(TESTS.parent / ".typing"),  # the environment doesn't have this checkout
        "RAY_USAGE_STATS_ENABLED": "0",
        "TRUNKLINE_TEST_PYTHON": str(python),
        "TRUNKLINE_TEST_START": "900",  # eight engines on two cores
    }
    before = {name: os.environ.get(name) for name in own}
    os.environ.update(own)
    yield own
    for name, value in before.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value


def of_ray() -> set[int]:
    """The processes of Ray on this machine."""
    found = set()
    for process in psutil.process_iter(["name", "cmdline"]):
        command = " ".join(process.info["cmdline"] or [process.info["name"]])
        if command.startswith("ray::") or "/ray/core/src/ray/" in command or "/ray/dashboard/" in command:
            found.add(process.pid)
    return found


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """Each test ends all processes of Ray that it has started."""
    before = of_ray()
    yield
    deadline = time.monotonic() + WAIT
    while left := of_ray() - before:
        assert time.monotonic() < deadline, [psutil.Process(pid).cmdline() for pid in left if psutil.pid_exists(pid)]
        time.sleep(0.2)


@pytest.fixture
def launch(zoo: Callable[[str], Path], tmp_path: Path, live_server: ModuleType) -> Iterator[Callable[..., Any]]:
    """``launch("--flag", "value")``: a server of the test's own on a small Llama, ready."""
    servers: list[Any] = []

    def make(*arguments: str) -> Any:
        log = tmp_path / f"server{len(servers)}.log"
        common = ["--served-model-name", "tiny", "--dtype", "float32"]
        servers.append(live_server.LiveServer([str(zoo("llama")), *common, *arguments], log))
        servers[-1].wait()
        return servers[-1]

    yield make
    for server in servers:
        if server.process.poll() is None:
            server.terminate()
        server.close()
