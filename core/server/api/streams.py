"""Event streams, waiting for replies, and clients that disconnect."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from litestar import Response
from litestar.response.base import ASGIResponse
from litestar.types import Receive, Scope, Send

from trunkline.core.errors import RequestError, describe_error

from .bodies import DONE, AnyRequest, ClientGone, dialect_of, error_frame, stall_limit
from .contracts import owner_of

log = logging.getLogger(__name__)

T = TypeVar("T")

ABORT_EXTENSION = "trunkline.abort"
"""Key of ``scope["extensions"]``: a function that drops the connection without flushing it."""


@asynccontextmanager
async def until_gone(receive: Receive) -> AsyncGenerator[None]:
    """Cancel the block and raise ClientGone when the client disconnects. The body must have been read before."""
    owner = asyncio.current_task()
    assert owner is not None
    before, gone = owner.cancelling(), False

    async def watch() -> None:
        nonlocal gone
        while (await receive())["type"] != "http.disconnect":
            pass
        gone = True
        owner.cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield
    except asyncio.CancelledError:
        if gone and owner.uncancel() <= before:
            raise ClientGone from None
        raise
    finally:
        watcher.cancel()


async def while_connected(request: AnyRequest, work: Awaitable[T]) -> T:
    """The result of ``work``. When the client disconnects, ``work`` is cancelled: ClientGone. Read the body before."""
    async with until_gone(request.receive):
        return await work


class EventStream(Response[None]):
    """A ``text/event-stream`` response.

    The next frame is requested from ``frames`` only after the last one was written to the socket, so a slow client
    gets merged frames. ``on_close`` is called exactly once, however the stream ends: all frames sent; client
    disconnected; client hasn't read for ``--stream-timeout`` (then the connection is dropped); or an error, which is
    sent as an error frame followed by ``DONE``.
    """

    def __init__(self, frames: AsyncIterator[bytes], on_close: Callable[[], None]) -> None:
        super().__init__(None, status_code=200)
        self.frames = frames
        self.on_close = on_close

    def to_asgi_response(self, app: Any, request: AnyRequest, **_: Any) -> ASGIResponse:
        """Called by Litestar; its other arguments don't apply to a stream."""
        return _EventStream(self.frames, self.on_close, stall_limit(request), dialect_of(request), owner_of(request))


class _EventStream(ASGIResponse):
    _should_set_content_length = False

    def __init__(
        self, frames: AsyncIterator[bytes], on_close: Callable[[], None], stall_seconds: float, dialect: str, owner: str
    ) -> None:
        super().__init__(
            headers={
                "content-type": "text/event-stream; charset=utf-8",
                "cache-control": "no-cache",
                "x-accel-buffering": "no",  # tells nginx not to buffer the stream
            }
        )
        self.frames = frames
        self.on_close = on_close
        self.stall_seconds = stall_seconds
        self.dialect = dialect
        self.owner = owner  # the plugin and handler, for the log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self.start_response(send)
            async with until_gone(receive):
                await self._pump(send)
        except ClientGone:
            pass
        except TimeoutError:
            log.info("closed a stream that its client left unread for %g s", self.stall_seconds)
            extensions: dict[str, Any] = scope.get("extensions") or {}
            if ABORT_EXTENSION in extensions:
                extensions[ABORT_EXTENSION]()
        finally:
            self.on_close()

    async def _pump(self, send: Send) -> None:
        try:
            async for frame in self.frames:
                await self._send(send, frame)
        except RequestError as error:
            await self._send(send, error_frame(error, self.dialect) + DONE)
        except TimeoutError:
            raise
        except (Exception, SystemExit, KeyboardInterrupt) as error:  # raised by the plugin's generator
            log.error("a stream failed (%s): %s", self.owner, describe_error(error), exc_info=error)
            await self._send(send, error_frame(RequestError("Internal Server Error", status=500), self.dialect) + DONE)
        finally:
            close = getattr(self.frames, "aclose", None)
            if close is not None:
                await close()
        await self._send(send, b"", more=False)

    async def _send(self, send: Send, body: bytes, *, more: bool = True) -> None:
        async with asyncio.timeout(self.stall_seconds):
            await send({"type": "http.response.body", "body": body, "more_body": more})
