"""``Connection``: one end of the connection between a front and a replica."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any

from trunkline.core.engine.channel import Unsent
from trunkline.core.engine.frame_protocol import FrameProtocol
from trunkline.core.engine.messages import frames

# Seconds until an idle peer is asked whether it is there, between questions, and how many; milliseconds in which what
# was sent must arrive.
KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4, "TCP_USER_TIMEOUT": 30_000}


class Connection(FrameProtocol):
    """Sends messages in the order of :meth:`send`, those of a turn of the event loop in one frame: a pass of the engine
    is one frame. While the peer doesn't read, results of a request are merged, as the engine does.

    ``decode``: a frame's messages. ``receive_messages`` gets them.
    """

    end_reason = "the connection was lost"

    def __init__(self, decode: Callable[[bytes], list[Any]], receive_messages: Callable[[list[Any]], None]) -> None:
        super().__init__()
        self._decode, self._receive_messages = decode, receive_messages
        self._unsent = Unsent()
        self._scheduled = False
        self._peer_reads = asyncio.Event()
        self._peer_reads.set()

    def receive(self, body: bytes) -> None:
        self._receive_messages(self._decode(body))

    def send(self, message: Any) -> None:
        """Send a message; dropped when the connection has ended."""
        self._unsent.add(message)
        if not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._flush)

    def close(self) -> None:
        """Send what is unsent, then end the connection."""
        self._flush()
        if self._transport is not None:
            self._transport.close()

    async def drained(self) -> None:
        """Return when little of what was sent is in memory, or when the connection has ended."""
        await asyncio.sleep(0)  # the turn of the event loop ends, so it is written
        await self._peer_reads.wait()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Notice a peer that vanishes without ending the connection, such as a machine that is lost."""
        super().connection_made(transport)
        sock = transport.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in KEEPALIVE.items():
            if hasattr(socket, name):  # on Linux; others have some of them
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def pause_writing(self) -> None:
        self._peer_reads.clear()

    def resume_writing(self) -> None:
        self._peer_reads.set()
        self._flush()

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        self._peer_reads.set()

    def _flush(self) -> None:
        self._scheduled = False
        if self._unsent and self._peer_reads.is_set():
            for data in frames(self._unsent.take()):
                self.write(data)
