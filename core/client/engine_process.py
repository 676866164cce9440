"""Starts one engine process and exchanges messages with it over a socket."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import Any

from trunkline.core.engine.frame_protocol import FrameProtocol
from trunkline.core.engine.messages import EngineMessage, engine_decoder, frame
from trunkline.core.engine.pass_record import PassRecord, shared_file

# How long OpenMP threads spin at a barrier before they sleep: about 0.2 ms. It must be longer than it takes to wake a
# thread, up to 0.1 ms on virtual machines: else one that wakes late makes the others sleep at the next barrier, and so
# on, which costs a tenth of a decode pass. Much longer spinning takes cores from other processes.
SPIN = {"GOMP_SPINCOUNT": "20000"}
# How much freed memory glibc keeps, so that the buffers of the next pass needn't be mapped again page by page, which
# can take an eighth of the pass.
KEEP = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(256 << 20)}


class EngineProcess(FrameProtocol):
    """The child process, the socket to it, and the record of the requests that it runs."""

    def __init__(self, deliver: Callable[[list[EngineMessage]], None]) -> None:
        super().__init__()
        self.record = PassRecord()
        self._deliver = deliver
        self._child: subprocess.Popen[bytes] | None = None

    @classmethod
    async def spawn(
        cls, command: Sequence[str], first: Any, deliver: Callable[[list[EngineMessage]], None]
    ) -> EngineProcess:
        """Start ``command FD``, then send ``first`` with the pass record's descriptor as the first frame.

        The child is in a separate process group: Ctrl-C reaches the front only, which then drains.
        """
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        process = cls(deliver)
        with theirs, shared_file() as file:
            record = file.fileno()  # the same number in the child
            process.record = PassRecord(record)
            process._child = subprocess.Popen(
                [*command, str(theirs.fileno())],
                pass_fds=[theirs.fileno(), record],
                env={**KEEP, **({} if "OMP_WAIT_POLICY" in os.environ else SPIN), **os.environ},
                stdin=subprocess.DEVNULL,
                process_group=0,
            )
        await asyncio.get_running_loop().create_unix_connection(lambda: process, sock=ours)
        process.write(frame({**first, "record": record}))
        return process

    def receive(self, body: bytes) -> None:
        self._deliver(engine_decoder.decode(body))

    async def end(self, grace: float) -> int:
        """Wait up to ``grace`` seconds for the child to exit, then kill it. Returns the exit status."""
        assert self._child is not None
        deadline = time.monotonic() + grace
        while self._child.poll() is None and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        self._child.kill()
        status = await asyncio.to_thread(self._child.wait)
        self.abort()
        return status
