"""Reads JSON bodies into structs, and renders replies and errors in the dialect that a route declares.

A handler raises ``RequestError``; the app renders it as ``opt={"dialect": "native" | "openai"}`` says.
"""

from __future__ import annotations

import asyncio
from typing import Any, TypeVar

import msgspec
from litestar import Request, Response
from litestar.exceptions import InternalServerException, LitestarException
from litestar.exceptions.http_exceptions import RequestEntityTooLarge
from msgspec import Struct

from trunkline.core.errors import RequestError
from trunkline.core.settings import ServerSettings

from .body_limits import BodyLimits, InvalidBody
from .fields import check_refused
from .media_types import JSON, TEXT

S = TypeVar("S", bound=Struct)
AnyRequest = Request[Any, Any, Any]
"""Litestar's request, as handlers annotate it."""

DONE = b"data: [DONE]\n\n"
"""The last event of a stream."""
DEFAULT_TIMEOUT = 60.0
"""Seconds: the default of ``--stream-timeout``."""
SLOWEST_BODY = 8 << 10  # bytes per second: the lowest rate of a body, averaged over `--stream-timeout`

_encoder = msgspec.json.Encoder()


class ClientGone(RequestError):
    """The client closed the connection, so the response isn't sent."""

    def __init__(self) -> None:
        super().__init__("The client closed the connection.", status=499)


# -- bodies ----------------------------------------------------------------------------------


def encode_json(value: Any) -> bytes:
    """JSON bytes; NaN and infinities become null."""
    return _encoder.encode(value)


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response[bytes]:
    """A response with ``value`` as JSON."""
    return Response(encode_json(value), status_code=status, media_type=JSON, headers=headers)


def empty_response(status: int = 200) -> Response[bytes]:
    """A response without a body."""
    return Response(b"", status_code=status, media_type=TEXT)


async def read_body(request: AnyRequest, kind: type[S]) -> S:
    """The request's JSON body as ``kind``, with lax coercion of scalars; unknown fields are ignored.

    Raises InvalidBody when it is malformed, missing or has wrong types. RequestError when a field that ``kind``
    declares as :class:`Refused` is set; with status 413 when the body is longer than ``--max-body-bytes``, 408 when
    it arrives too slowly, 503 when the bodies of all running requests exceed ``--max-held-body-bytes``.
    """
    _check_content_type(request)
    return await _decode(request, await read_bytes(request), kind)


async def read_optional_body(request: AnyRequest, kind: type[S]) -> S:
    """:func:`read_body`, or ``kind``'s defaults when there is no body, whatever the content type says."""
    body = await read_bytes(request)
    if not body:
        return kind()
    _check_content_type(request)
    return await _decode(request, body, kind)


async def _decode(request: AnyRequest, body: bytes, kind: type[S]) -> S:
    value = await _limits(request).decode(body, kind)
    check_refused(value)
    return value


async def read_bytes(request: AnyRequest) -> bytes:
    """The raw body, empty when there is none. Errors as in :func:`read_body`."""
    try:
        return b"".join(await _read(request))
    except RequestEntityTooLarge:
        limit = request.route_handler.resolve_request_max_body_size()
        raise RequestError(
            f"The body is larger than the limit of {limit} bytes; split the request or raise --max-body-bytes.",
            status=413,
        ) from None
    except InternalServerException:  # raised by Litestar when the client disconnects before the body's end
        raise ClientGone from None
    except LitestarException as error:
        raise InvalidBody(error.detail) from None


async def _read(request: AnyRequest) -> list[bytes]:
    """The body in pieces. RequestError 408 if they arrive too slowly, 503 if all requests' bodies exceed the limit."""
    stall_seconds, take = stall_limit(request), _limits(request).account()
    declared = int(request.headers.get("content-length", 0))
    if declared <= (request.route_handler.resolve_request_max_body_size() or declared):  # else stream() raises
        take(declared)
    chunks: list[bytes] = []
    recent = 0  # bytes since the deadline was last extended
    try:
        async with asyncio.timeout(stall_seconds) as deadline:
            async for chunk in request.stream():
                if not declared:
                    take(len(chunk))
                chunks.append(chunk)
                recent += len(chunk)
                if recent >= SLOWEST_BODY * stall_seconds:
                    recent = 0
                    deadline.reschedule(asyncio.get_running_loop().time() + stall_seconds)
    except TimeoutError:
        raise RequestError(
            f"The body arrived too slowly: less than {SLOWEST_BODY} bytes per second for {stall_seconds:g} s.",
            status=408,
        ) from None
    return chunks


def _limits(request: AnyRequest) -> BodyLimits:
    limits: BodyLimits = request.app.state.get("bodies") or BodyLimits(ServerSettings())
    return limits


def _check_content_type(request: AnyRequest) -> None:
    kind, _ = request.content_type
    if kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json")):
        return
    message = "Unsupported Media Type: Only 'application/json' is allowed"
    if dialect_of(request) == "openai":
        raise RequestError(message)
    raise InvalidBody(f"{message}; set the header 'Content-Type: application/json'.")


def stall_limit(request: AnyRequest) -> float:
    """Seconds after which a client that stops reading a stream, or stops sending its body, is cut off."""
    server = request.app.state.get("server")
    return DEFAULT_TIMEOUT if server is None else float(server.stream_timeout)


# -- errors ----------------------------------------------------------------------------------


def is_draining(request: AnyRequest) -> bool:
    """Whether the server is shutting down. Streams without an end must end then."""
    return bool(request.app.state["lifecycle"].draining)


def dialect_of(request: AnyRequest) -> str:
    """``"native"`` or ``"openai"``: the format of the errors of the request's route."""
    handler = request.scope.get("route_handler")
    return "native" if handler is None else str(handler.opt.get("dialect", "native"))


def error_status(error: RequestError, dialect: str) -> int:
    """The HTTP status of an error. OpenAI's clients expect 404 for an unknown model."""
    return 404 if dialect == "openai" and error.code == "model_not_found" else error.status


def render_error(error: RequestError, dialect: str = "native") -> dict[str, Any]:
    """The JSON body of an error, in the format that clients of the dialect parse."""
    status = error_status(error, dialect)
    if dialect == "openai" and error.code == "model_not_found":
        detail = {"message": error.message, "type": "invalid_request_error", "param": "model", "code": error.code}
        return {"error": detail}
    if isinstance(error, InvalidBody):
        return _flat(error, "Bad Request", status)
    if dialect == "openai":
        return _flat(error, "BadRequestError" if status < 500 else "InternalServerError", status)
    if status >= 500:
        return _flat(error, str(status), status)
    return {"error": {"message": error.message}}


def _flat(error: RequestError, kind: str, status: int) -> dict[str, Any]:
    return {"object": "error", "message": error.message, "type": kind, "param": error.param, "code": status}


def error_response(error: RequestError, dialect: str = "native") -> Response[bytes]:
    """An error as a response, with ``Retry-After`` if the request may be retried."""
    return json_response(render_error(error, dialect), error_status(error, dialect), retry_headers(error))


def retry_headers(error: RequestError) -> dict[str, str]:
    """``Retry-After`` if the request may be retried, in whole seconds."""
    return {} if error.retry_after is None else {"retry-after": str(max(1, round(error.retry_after)))}


def error_frame(error: RequestError, dialect: str = "native") -> bytes:
    """An error as an event of a stream that has already begun with status 200."""
    status = error_status(error, dialect)
    kind = "invalid_request_error" if status < 500 else "server_error"
    detail = {"message": error.message, "type": kind, "param": error.param, "code": status}
    return event_frame({"error": detail})


def event_frame(value: Any) -> bytes:
    """One server-sent event with ``value`` as JSON."""
    return b"data: " + encode_json(value) + b"\n\n"
