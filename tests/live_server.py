"""A live server: ``trunkline serve`` on a tiny checkpoint, in processes of its own; and servers that tests share."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import httpx
import psutil

# For tests that are run again on other servers: the interpreter that runs them, flags for all of them, and the seconds
# that they may take to start.
PYTHON, FLAGS, START = "TRUNKLINE_TEST_PYTHON", "TRUNKLINE_TEST_FLAGS", "TRUNKLINE_TEST_START"
MOST = 3  # shared servers at a time; each takes half a gigabyte


class LiveServer:
    """One ``trunkline serve``. ``log`` is the file with everything it says; ``environment`` is added to ours."""

    def __init__(self, arguments: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        self.arguments = list(arguments)
        script = "from trunkline.core.cli import main; main()"
        python, flags = os.environ.get(PYTHON, sys.executable), os.environ.get(FLAGS, "").split()
        command = [python, "-c", script, "serve", *flags, *arguments, "--port", str(self.port)]
        with log.open("w") as sink:
            self.process = subprocess.Popen(
                command, stdout=sink, stderr=subprocess.STDOUT, env=os.environ | (environment or {})
            )

    def wait(self, key: str = "None") -> None:
        """As SGLang's clients do, which show a key that they don't have: poll /v1/models until it answers 200."""
        deadline = time.monotonic() + float(os.environ.get(START, 240))
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
        if self.process.poll() is None and os.environ.get(FLAGS):
            self.process.terminate()  # it may have started processes that aren't its children
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(60)
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(60)


class SharedServers:
    """``servers("--flag", "value")``: a server with these arguments, ready; the same one for the same call.

    Of the servers that are alive, the one that was asked for longest ago makes room for another.
    """

    def __init__(self, log: Callable[[], Path]) -> None:
        self._log = log
        self._servers: dict[tuple[tuple[str, ...], frozenset[tuple[str, str]]], LiveServer] = {}

    def __call__(self, *arguments: str, environment: Mapping[str, str] | None = None) -> LiveServer:
        name = arguments, frozenset((environment or {}).items())
        server = self._servers.pop(name, None)
        if server is None or server.process.poll() is not None:
            while len(self._servers) >= MOST:
                self.discard(next(iter(self._servers.values())))
            server = LiveServer(arguments, self._log(), environment)
            self._servers[name] = server
            server.wait()
        self._servers[name] = server  # behind the others
        return server

    def discard(self, server: LiveServer) -> None:
        """Close it; the next test that asks gets a new one."""
        server.close()
        self._servers = {name: one for name, one in self._servers.items() if one is not server}

    def close(self) -> None:
        for server in list(self._servers.values()):
            self.discard(server)
