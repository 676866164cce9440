"""``FrameProtocol``: frames over a connection of asyncio. The engine process uses threads, see :mod:`.channel`."""

from __future__ import annotations

import asyncio
import logging
from typing import cast

from .messages import MAX_FRAME

log = logging.getLogger("trunkline.connection")


class FrameProtocol(asyncio.Protocol):
    """Divides the bytes that arrive into frames, for :meth:`receive`.

    ``lost``: done when the connection has ended or the peer has broken the protocol, with the reason. ``limit``: bytes
    of a frame. ``end_reason``: when the peer has closed it.
    """

    limit = MAX_FRAME
    end_reason = "it died"

    def __init__(self) -> None:
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._buffer = bytearray()
        self._transport: asyncio.Transport | None = None

    def receive(self, body: bytes) -> None:
        """Called with the content of each frame. An exception ends the connection."""
        raise NotImplementedError

    def write(self, data: bytes) -> None:
        """Send frames; they are dropped when the connection has ended."""
        if self._transport is not None:
            self._transport.write(data)

    def abort(self) -> None:
        """End the connection at once."""
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's class doesn't inherit from asyncio.Transport

    def data_received(self, data: bytes) -> None:
        buffer = self._buffer
        buffer += data
        start = 0
        while len(buffer) - start >= 4 and not self.lost.done():
            length = int.from_bytes(buffer[start : start + 4], "little")
            if length > self.limit:
                self._break("it sent a broken frame")
                return
            if len(buffer) - start < 4 + length:
                break
            # Copy: decoded Raw values refer to the buffer, which is reused.
            body = bytes(buffer[start + 4 : start + 4 + length])
            start += 4 + length
            try:
                self.receive(body)
            except Exception:
                log.exception("a frame could not be handled")
                self._break("it sent a frame that makes no sense")
        del buffer[:start]

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self._lose(self.end_reason)

    def _break(self, reason: str) -> None:
        self._lose(reason)
        self.abort()

    def _lose(self, reason: str) -> None:
        if not self.lost.done():
            self.lost.set_result(reason)
