"""The HTTP protocol of uvicorn with limits on the size and time of each part of a message and of a connection."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterator
from http import HTTPStatus
from typing import Any, Literal

import httptools
import uvicorn
from litestar import Litestar
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from trunkline.core.logs import RateLimited
from trunkline.core.server.api.streams import ABORT_EXTENSION

MAX_HEAD = 16 << 10  # bytes of request line and headers; also bytes of trailers
MAX_HEADERS = 256  # header fields of a request
MAX_PIPELINED = 64  # requests that wait on one connection for the response to an earlier one
# Framing are the bytes of a body that aren't content: chunk sizes, chunk extensions, trailers. Parsing tiny chunks is
# slow, so a body may have MAX_FRAMING bytes of it, and one more for each FRAMED bytes of content.
MAX_FRAMING = 128 << 10
FRAMED = 8
HEAD_SECONDS = 30.0  # header time: from opening a connection, or from the first byte of a head, to the end of the head
KEEP_ALIVE_SECONDS = 30  # idle time between a response and the next head
FLUSH_SECONDS = 30.0  # a closing connection is dropped when its client reads nothing for this time
LINGER_SECONDS = 3.0  # time for the client to read the last response before the connection is closed
SHUTDOWN_SECONDS = 3  # time for open connections to finish after the engine has stopped
WRITE_BUFFER = 16 << 10  # bytes; a stream with more unsent data waits for its client

bad_requests = RateLimited(logging.getLogger("trunkline.server"), logging.WARNING, seconds=10.0)


# Status and text of the response to a message that can't be read.
NOT_HTTP = (400, "Invalid HTTP request received.")
NO_HOST = (400, "A request must have one Host header.")  # RFC 9112, section 3.2
NO_TUNNEL = (405, "CONNECT is not supported: this is no proxy.")
HEAD_TOO_SLOW = (408, f"The request head took longer than {HEAD_SECONDS:g} s.")
HEAD_TOO_LARGE = (431, f"Request head too large: at most {MAX_HEAD} bytes and {MAX_HEADERS} headers.")
TRAILERS_TOO_LARGE = (431, f"Trailers too large: at most {MAX_HEAD} bytes.")
FRAMING_TOO_LARGE = (400, f"Chunks too small or their extensions too large: over {MAX_FRAMING} bytes without content.")
TOO_MANY_PIPELINED = (503, f"Too many pipelined requests: at most {MAX_PIPELINED} may wait.")


class UnreadableMessage(Exception):
    """Raised by a parser callback to stop parsing; its arguments are status and text of the response."""


class BoundedProtocol(HttpToolsProtocol):
    """One connection. Adds ``ABORT_EXTENSION`` to each request's scope.

    The response to a message that can't be read is sent after those to the requests before it; then the connection is
    closed. Upgrade headers are ignored (RFC 9110, section 7.8): the request is answered in HTTP/1.1.
    """

    transport: asyncio.Transport
    _running: RequestResponseCycle | None = None  # the request that is being answered; later ones are in ``pipeline``
    _refusal: tuple[int, str] | None = None  # the last response of the connection; no more data is read
    _requests = 0  # number of heads begun
    _part: Literal["between", "head", "body"] = "between"  # the part of a message that is being read
    _size = 0  # bytes of complete headers in the current head, then in the trailers
    _body = 0  # bytes of all bodies so far
    _framing = 0.0  # framing of the current part in bytes, less what its content allows
    _unsent = 0  # unsent bytes of a closing connection at the last check
    _timer: asyncio.TimerHandle | None = None  # of the time limit that applies now

    # -- connection --------------------------------------------------------------------------

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=WRITE_BUFFER)
        self._set_timer(HEAD_SECONDS, self._head_is_late)

    def connection_lost(self, exc: Exception | None) -> None:
        self._set_timer(None)
        self.pipeline.clear()
        if self._running is not None and self._running is not self.cycle:  # uvicorn notifies the last request only
            self._running.disconnected = True
            self._running.message_event.set()
        super().connection_lost(exc)

    def shutdown(self) -> None:
        super().shutdown()
        self._limit_flush()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._limit_flush()

    # -- reading -----------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        if self._refusal is not None or self.parser is None:
            return
        begun, body = (self._requests, self._part), self._body
        try:
            self._parse(data)
        except httptools.HttpParserError as error:
            cause = error.__context__  # what a callback raised
            self._refuse(*(cause.args if isinstance(cause, UnreadableMessage) else NOT_HTTP))
            return
        if begun == (self._requests, self._part):  # all of ``data`` is of the same part
            content = self._body - body
            self._framing = max(0.0, self._framing + len(data) - content - content / FRAMED)
            if self._framing > (MAX_FRAMING if self._part == "body" else MAX_HEAD):
                self._refuse(*(FRAMING_TOO_LARGE if self._part == "body" else HEAD_TOO_LARGE))

    def _parse(self, data: bytes) -> None:
        """Feed the parser. It stops after a head with an Upgrade header; then a new parser gets the same head without
        that header, and the rest of the data."""
        pieces: list[bytes | memoryview] = [data]
        while pieces:
            piece = pieces.pop()
            try:
                self.parser.feed_data(piece)
            except httptools.HttpParserUpgrade as offer:
                pieces += [memoryview(piece)[offer.args[0] :], self._head_without_upgrade()]
                self.parser = httptools.HttpRequestParser(self)
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's first one

    def _head_without_upgrade(self) -> bytes:
        line = b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())
        kept = [b"%s: %s" % header for header in self.headers if header[0] != b"upgrade"]
        return b"\r\n".join([line, *kept, b"", b""])

    def on_message_begin(self) -> None:
        self._unset_keepalive_if_required()
        super().on_message_begin()
        self._requests += 1
        self._part, self._size, self._framing = "head", 0, 0.0
        self._set_timer(HEAD_SECONDS, self._head_is_late)
        extensions: Any = self.scope.setdefault("extensions", {})
        extensions[ABORT_EXTENSION] = self.transport.abort

    def on_header(self, name: bytes, value: bytes) -> None:
        self._size += len(name) + len(value) + 4
        if self._part != "head":  # a trailer, which is dropped
            if self._size > MAX_HEAD:
                raise UnreadableMessage(*TRAILERS_TOO_LARGE)
            return
        if self._size + len(self.url) > MAX_HEAD or len(self.headers) == MAX_HEADERS:
            raise UnreadableMessage(*HEAD_TOO_LARGE)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self.parser.get_method() == b"CONNECT":
            raise UnreadableMessage(*NO_TUNNEL)
        if self.parser.should_upgrade():
            return  # _parse feeds the same head again
        hosts = sum(name == b"host" for name, _ in self.headers)
        if hosts > 1 or (not hosts and self.parser.get_http_version() == "1.1"):
            raise UnreadableMessage(*NO_HOST)
        if len(self.url) > MAX_HEAD:
            raise UnreadableMessage(*HEAD_TOO_LARGE)
        if len(self.pipeline) >= MAX_PIPELINED:
            raise UnreadableMessage(*TOO_MANY_PIPELINED)
        self._set_timer(None)
        self._unset_keepalive_if_required()  # set by an earlier response since this head began
        self._part, self._size, self._framing = "body", 0, 0.0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._body += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self._part == "body":  # else the head has an Upgrade header and is parsed again
            self._part, self._framing = "between", 0.0
            super().on_message_complete()

    # -- answering ---------------------------------------------------------------------------

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._refuse_in_turn()
        self._limit_flush()

    def _refuse(self, status: int, text: str) -> None:
        """Stop reading, and send this response after those to earlier requests."""
        bad_requests.log("bad request from %s: %s", self.client and self.client[0], text)
        self._refusal = status, text
        self._set_timer(None)
        cycle = self.cycle
        if self._part != "body":
            self._refuse_in_turn()
        elif self.pipeline and self.pipeline[0][0] is cycle:
            self.pipeline.popleft()
            self._refuse_in_turn()
        elif cycle.response_complete:
            self._close_gently()
        elif cycle.response_started:
            self.transport.abort()
        else:
            cycle.disconnected = True
            cycle.message_event.set()
            self._answer_refusal(status, text)

    def _refuse_in_turn(self) -> None:
        """Send the refusal if all earlier requests are answered."""
        answered = self._running is None or self._running.response_complete
        if self._refusal is not None and answered and not self.pipeline and not self.transport.is_closing():
            self._answer_refusal(*self._refusal)

    def _answer_refusal(self, status: int, text: str) -> None:
        head = (
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: text/plain; charset=utf-8\r\n"
            f"content-length: {len(text)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write((head + text).encode())
        self._close_gently()

    def _close_gently(self) -> None:
        """Close after ``LINGER_SECONDS``: closing with unread data resets the connection, and the response is lost."""
        if self.transport.is_closing():
            return
        self._unset_keepalive_if_required()
        self.flow.resume_reading()
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._set_timer(LINGER_SECONDS, self._close)

    def _close(self) -> None:
        self.transport.close()
        self._limit_flush()

    def _head_is_late(self) -> None:
        if self._requests:
            self._refuse(*HEAD_TOO_SLOW)
        else:
            self.transport.abort()

    def _limit_flush(self) -> None:
        """Limit the time in which a closing transport flushes: without a limit, a client that doesn't read keeps it."""
        if self.transport.is_closing():
            self._unsent = self.transport.get_write_buffer_size()
            self._set_timer(FLUSH_SECONDS, self._flush_or_drop)

    def _flush_or_drop(self) -> None:
        before = self._unsent
        self._limit_flush()
        if self._unsent >= before:
            self.transport.abort()

    def _set_timer(self, seconds: float | None, then: Callable[[], None] | None = None) -> None:
        """Call ``then`` after ``seconds``, in place of the timer that was set before; None = no timer."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if seconds is None or then is None else self.loop.call_later(seconds, then)


class Server(uvicorn.Server):
    """uvicorn without its signal handlers, which would close the port before requests are drained."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def uvicorn_config(app: Litestar) -> uvicorn.Config:
    """uvicorn's configuration. Forwarding headers are ignored, because any client can send them."""
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
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
    )
