"""uvicorn as we run it, with the limits that it lacks: long heads, slow openers, dead readers."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import httptools
import uvicorn
from litestar import Litestar
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from .api import ABORT_EXTENSION

MAX_HEAD = 16 << 10  # bytes of request line and headers
HEAD_SECONDS = 30.0  # from opening a connection, or beginning a head, to the head's end
FLUSH_SECONDS = 30.0  # in which the client of a closing connection must take some of what is unsent
LAST_WORDS = 3  # seconds that open connections get after the engine has ended
WRITE_BUFFER = 16 << 10  # bytes; more unsent data makes a stream wait for its client


class BoundedProtocol(HttpToolsProtocol):
    """One connection. Adds ``ABORT_EXTENSION`` to each request's scope."""

    transport: asyncio.Transport
    _requests = 0  # heads begun
    _in_head = True
    _head = 0  # bytes of the running head: those in complete headers
    _unparsed = 0  # and those of whole chunks in which it hasn't ended
    _unsent = 0  # bytes, when a closing connection was last looked at
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=WRITE_BUFFER)
        self._give(HEAD_SECONDS)

    def connection_lost(self, exc: Exception | None) -> None:
        self._give(None)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        begun = self._requests
        super().data_received(data)
        if self._in_head and begun == self._requests:
            self._unparsed += len(data)
            if self._unparsed > MAX_HEAD and not self.transport.is_closing():
                self.send_400_response("Request head too large.")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._requests += 1
        self._in_head, self._head, self._unparsed = True, 0, 0
        self._give(HEAD_SECONDS)
        extensions: Any = self.scope.setdefault("extensions", {})
        extensions[ABORT_EXTENSION] = self.transport.abort

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        self._head += len(name) + len(value)

    def on_headers_complete(self) -> None:
        self._give(None)
        self._in_head = False
        if self._head + len(self.url) > MAX_HEAD:
            raise httptools.HttpParserError("request head too large")  # answered 400 by data_received
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._limit_flush()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._limit_flush()

    def shutdown(self) -> None:
        super().shutdown()
        self._limit_flush()

    def _limit_flush(self) -> None:
        """A closing transport flushes first, which never ends when the client doesn't read."""
        if self.transport.is_closing():
            self._unsent = self.transport.get_write_buffer_size()
            self._give(FLUSH_SECONDS, self._flush_or_drop)

    def _flush_or_drop(self) -> None:
        before = self._unsent
        self._limit_flush()
        if self._unsent >= before:
            self.transport.abort()

    def _give(self, seconds: float | None, then: Callable[[], None] | None = None) -> None:
        """Drop the connection, or do ``then``, after ``seconds``; None = no limit."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if seconds is None else self.loop.call_later(seconds, then or self.transport.abort)


class Server(uvicorn.Server):
    """uvicorn without its signal handlers: it would close the door before the drain."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def uvicorn_config(app: Litestar) -> uvicorn.Config:
    """How connections are handled. Forwarding headers aren't believed: anybody can send them."""
    return uvicorn.Config(
        app,
        http=BoundedProtocol,
        ws="none",
        lifespan="on",
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=LAST_WORDS,
    )
