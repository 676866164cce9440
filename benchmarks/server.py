"""Start a trunkline server of our own, wait until it is ready, and stop it again."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from http_client import Connection

_START = "from trunkline.core.cli import main; main()"


@asynccontextmanager
async def running(model: str, flags: Sequence[str] = (), *, patience: float = 300.0) -> AsyncIterator[str]:
    """The base URL of ``trunkline serve MODEL FLAGS…`` on a free port.

    RuntimeError with the end of its output when it exits or isn't ready within ``patience`` seconds.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    base_url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-c", _START, "serve", model, "--port", str(port), *flags]
    with tempfile.TemporaryFile() as log, subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT) as process:
        try:
            if not await _ready(base_url, process, time.monotonic() + patience):
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


async def _ready(base_url: str, process: subprocess.Popen[bytes], deadline: float) -> bool:
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
