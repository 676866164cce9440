"""Live servers on tiny checkpoints: of one test, of a module, and a few that all tests share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest


@pytest.fixture(scope="session")
def checkpoint(zoo: Callable[[str], Path]) -> Path:
    """A tiny Llama."""
    return zoo("llama")


@pytest.fixture
def launch(checkpoint: Path, tmp_path: Path, live_server: ModuleType) -> Iterator[Callable[..., Any]]:
    """``launch("--flag", "value")``: a server of the test's own."""
    servers: list[Any] = []

    def make(*arguments: str) -> Any:
        log = tmp_path / f"server{len(servers)}.log"
        servers.append(live_server.LiveServer([str(checkpoint), *arguments], log))
        return servers[-1]

    yield make
    for server in servers:
        server.close()


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory, live_server: ModuleType) -> Iterator[Callable[..., Any]]:
    """``live("--flag", "value")``: a server for a module's tests, with all arguments given, ready."""
    servers: list[Any] = []

    def make(*arguments: str, key: str = "None", environment: dict[str, str] | None = None) -> Any:
        log = tmp_path_factory.mktemp("live") / "log"
        servers.append(live_server.LiveServer(arguments, log, environment))
        servers[-1].wait(key=key)
        return servers[-1]

    yield make
    for server in servers:
        server.close()


@pytest.fixture
def server(shared_server: Callable[..., Any], checkpoint: Path) -> Any:
    """One server for all tests that leave it as they found it. In float32, where cached prefixes change no token."""
    flags = ["--served-model-name", "tiny", "--dtype", "float32", "--stream-timeout", "300"]
    return shared_server(str(checkpoint), *flags)


@pytest.fixture(scope="session")
def profiles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the workbench leaves profiles."""
    return tmp_path_factory.mktemp("profiles")


@pytest.fixture
def workbench(shared_server: Callable[..., Any], checkpoint: Path, profiles: Path) -> Any:
    """One server for tests that change it and undo that: two requests at a time, two tasks."""
    flags = ["--task", "generation,embedding", "--dtype", "float32", "--max-running-requests", "2"]
    flags += ["--decode-log-interval", "5"]
    return shared_server(str(checkpoint), *flags, environment={"SGLANG_TORCH_PROFILER_DIR": str(profiles)})


@pytest.fixture(scope="session")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where nothing is."""
    return tmp_path_factory.mktemp("empty")


@pytest.fixture
def fleet(shared_server: Callable[..., Any], zoo: Callable[[str], Path], empty: Path) -> Any:
    """A generator, an embedder, a reranker and a reward model behind one port. No weights are allowed but theirs."""
    names = {"talks": "llama", "embeds": "bert", "ranks": "bert-score", "labels": "qwen2-labels"}
    arguments = ["--dtype", "float32", "--threads", "1", "--allow-weights-dir", str(empty)]
    for name, checkpoint in names.items():
        arguments += ["--model-path", str(zoo(checkpoint)), "--served-model-name", name]
    return shared_server(*arguments)


@pytest.fixture
def http(server: Any) -> Iterator[httpx.Client]:
    """A client of the shared server."""
    with httpx.Client(base_url=server.url, timeout=120) as client:
        yield client
