"""Start a trunkline server of our own, wait until it is ready, and stop it again."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from http_client import Connection

_START = "from trunkline.core.cli import main; main()"


def environment_of(source: Path) -> dict[str, str]:
    """The environment in which this interpreter runs another checkout. ValueError when ``source`` is none.

    Packages, the list of plugins among them, stay those of this environment.
    """
    tree = (source / ".typing").resolve()  # core, kernels and plugins as type checkers see them: below trunkline/
    environment = {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    where = [sys.executable, "-c", "import trunkline.core; print(trunkline.core.__file__)"]
    found = subprocess.run(where, env=environment, cwd="/", capture_output=True, text=True, check=True).stdout
    if not Path(found.strip()).resolve().is_relative_to(source.resolve()):
        raise ValueError(f"{source} is no checkout of trunkline")
    return environment


@asynccontextmanager
async def running(
    model: str, flags: Sequence[str] = (), *, patience: float = 300.0, source: Path | None = None
) -> AsyncIterator[str]:
    """The base URL of ``trunkline serve MODEL FLAGS…`` on a free port, of the checkout ``source`` if one is given.

    RuntimeError with the end of its output when it exits or isn't ready within ``patience`` seconds.
    """
    environment = None if source is None else environment_of(source)
    port = free_port()
    base_url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-c", _START, "serve", model, "--port", str(port), *flags]
    with (
        tempfile.TemporaryFile() as log,
        subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment) as process,
    ):
        try:
            if not await ready(base_url, process, time.monotonic() + patience):
                log.seek(0)
                tail = log.read()[-4000:].decode(errors="replace")
                raise RuntimeError(f"the server did not start (exit status {process.poll()}):\n{tail}")
            yield base_url
        finally:
            process.terminate()
            try:
                await asyncio.to_thread(process.wait, 60)
            except subprocess.TimeoutExpired:
                process.kill()


def free_port() -> int:
    """A port on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def ready(base_url: str, process: subprocess.Popen[bytes], deadline: float) -> bool:
    """Whether /health answers 200 before the deadline, by time.monotonic()."""
    while process.poll() is None and time.monotonic() < deadline:
        connection = Connection(base_url)
        try:
            status, _ = await connection.request("GET", "/health")
            if status == 200:
                return True
        except (OSError, asyncio.IncompleteReadError, IndexError):
            pass
        finally:
            await connection.close()
        await asyncio.sleep(0.2)
    return False
