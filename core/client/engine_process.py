"""Starts one engine process and exchanges messages with it over a socket."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import Any, cast

from trunkline.core.engine.messages import MAX_FRAME, EngineMessage, engine_decoder, frame
from trunkline.core.engine.pass_record import PassRecord, shared_file

log = logging.getLogger("trunkline.supervisor")

# How long OpenMP threads spin at a barrier before they sleep: about 0.2 ms. It must be longer than it takes to wake a
# thread, up to 0.1 ms on virtual machines: else one that wakes late makes the others sleep at the next barrier, and so
# on, which costs a tenth of a decode pass. Much longer spinning takes cores from other processes.
SPIN = {"GOMP_SPINCOUNT": "20000"}
# How much freed memory glibc keeps, so that the buffers of the next pass needn't be mapped again page by page, which
# can take an eighth of the pass.
KEEP = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(256 << 20)}


class EngineProcess(asyncio.Protocol):
    """The child process, the socket to it, and the record of the requests that it runs."""

    def __init__(self, deliver: Callable[[list[EngineMessage]], None]) -> None:
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.record = PassRecord()
        self._deliver = deliver
        self._buffer = bytearray()
        self._child: subprocess.Popen[bytes] | None = None
        self._transport: asyncio.Transport | None = None

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

    def write(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)

    async def end(self, grace: float) -> int:
        """Wait up to ``grace`` seconds for the child to exit, then kill it. Returns the exit status."""
        assert self._child is not None
        deadline = time.monotonic() + grace
        while self._child.poll() is None and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        self._child.kill()
        status = await asyncio.to_thread(self._child.wait)
        if self._transport is not None:
            self._transport.abort()
        return status

    # -- asyncio.Protocol --------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's class doesn't inherit from asyncio.Transport

    def data_received(self, data: bytes) -> None:
        buffer = self._buffer
        buffer += data
        start = 0
        while len(buffer) - start >= 4:
            length = int.from_bytes(buffer[start : start + 4], "little")
            if length > MAX_FRAME:
                self._lose("it sent a broken frame")
                return
            if len(buffer) - start < 4 + length:
                break
            # Copy: decoded Raw values refer to the buffer, which is reused.
            body = bytes(buffer[start + 4 : start + 4 + length])
            start += 4 + length
            self._handle(body)
        del buffer[:start]

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self._lose("it died")

    def _handle(self, body: bytes) -> None:
        try:
            self._deliver(engine_decoder.decode(body))
        except Exception:
            log.exception("a frame from the engine could not be handled")
            self._lose("it sent a frame that makes no sense")

    def _lose(self, reason: str) -> None:
        if not self.lost.done():
            self.lost.set_result(reason)
