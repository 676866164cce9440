"""Servers with replicas on Ray, in an environment that has it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from .processes import ends_all

TESTS = Path(__file__).parent.parent
RAY = ("ray[serve]>=2.60,<2.61",)


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
        "RAY_worker_niceness": "0",  # instead of 15: what else runs on the machine would delay the tests
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


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """Each test ends all processes of Ray that it has started."""
    with ends_all():
        yield


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
