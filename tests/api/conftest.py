"""A live server: ``trunkline serve`` on a tiny checkpoint, in processes of its own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest


class LiveServer:
    """One ``trunkline serve``. ``log`` is the file with everything it says."""

    def __init__(self, arguments: list[str], log: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        self.arguments = arguments
        script = "from trunkline.core.cli import main; main()"
        command = [sys.executable, "-c", script, "serve", *arguments, "--port", str(self.port)]
        with log.open("w") as sink:
            self.process = subprocess.Popen(command, stdout=sink, stderr=subprocess.STDOUT)

    def wait(self, seconds: float = 240, key: str = "None") -> None:
        """As SGLang's clients do, which show a key that they don't have: poll /v1/models until it answers 200."""
        deadline = time.monotonic() + seconds
        while True:
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            try:
                answer = httpx.get(f"{self.url}/v1/models", headers={"authorization": f"Bearer {key}"})
                if answer.status_code == 200 and httpx.get(f"{self.url}/health").status_code == 200:
                    return
            except httpx.ConnectError:
                time.sleep(0.1)

    def engine(self) -> psutil.Process:
        """The engine process."""
        (child,) = psutil.Process(self.process.pid).children()
        return child

    def terminate(self) -> int:
        """SIGTERM; the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(60)


@pytest.fixture(scope="session")
def checkpoint(zoo: Callable[[str], Path]) -> Path:
    """A tiny Llama."""
    return zoo("llama")


@pytest.fixture
def launch(checkpoint: Path, tmp_path: Path) -> Iterator[Callable[..., LiveServer]]:
    """``launch("--flag", "value")``: a server of the test's own."""
    servers: list[LiveServer] = []

    def make(*arguments: str) -> LiveServer:
        servers.append(LiveServer([str(checkpoint), *arguments], tmp_path / f"server{len(servers)}.log"))
        return servers[-1]

    yield make
    for server in servers:
        server.close()


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., LiveServer]]:
    """``live("--flag", "value")``: a server for a module's tests, with all arguments given, ready."""
    servers: list[LiveServer] = []

    def make(*arguments: str, key: str = "None") -> LiveServer:
        servers.append(LiveServer([*arguments], tmp_path_factory.mktemp("live") / "log"))
        servers[-1].wait(key=key)
        return servers[-1]

    yield make
    for server in servers:
        server.close()


@pytest.fixture(scope="session")
def server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """One server for all tests that leave it as they found it."""
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    live = LiveServer([str(checkpoint), "--served-model-name", "tiny"], tmp_path_factory.mktemp("live") / "log")
    live.wait()
    yield live
    live.close()


@pytest.fixture
def http(server: LiveServer) -> Iterator[httpx.Client]:
    """A client of the shared server."""
    with httpx.Client(base_url=server.url, timeout=120) as client:
        yield client
