"""Litestar's exception handlers, which turn exceptions into responses, and the response header ``X-Request-Id``."""

from __future__ import annotations

import logging
import uuid

import msgspec
from litestar import Response
from litestar.exceptions import HTTPException, MethodNotAllowedException, NotFoundException
from litestar.types import Message, Scope

from trunkline.core.client.replies import printable, response_id
from trunkline.core.errors import RequestError, describe_error
from trunkline.core.server.api.bodies import AnyRequest, dialect_of, error_response, json_response
from trunkline.core.server.api.body_limits import InvalidBody
from trunkline.core.server.api.contracts import owner_of

from .auth import InvalidKey

log = logging.getLogger("trunkline.server")


def on_request_error(request: AnyRequest, error: RequestError) -> Response[bytes]:
    """The error in the route's dialect. Its message isn't logged, because it may quote the request."""
    log.debug("status=%d path=%s", error.status, printable(request.scope["path"]))
    if isinstance(error, InvalidKey):
        headers = {"www-authenticate": "Bearer"}
        if _under_v1(request):
            return _openai_error(error.reason, 401, "invalid_api_key", headers)
        return json_response({"error": error.message}, 401, headers)
    return error_response(error, dialect_of(request))


def on_http_error(request: AnyRequest, error: HTTPException) -> Response[bytes]:
    """Litestar's own errors: unknown path, wrong method, arguments that can't be parsed."""
    if isinstance(error, NotFoundException | MethodNotAllowedException):
        headers = dict(error.headers or {})
        if _under_v1(request):
            route = f"{request.method} {printable(request.scope['path'])}"
            return _openai_error(f"no route {route} here, see /docs", error.status_code, None, headers)
        missing = isinstance(error, NotFoundException)
        return json_response({"detail": "Not Found" if missing else "Method Not Allowed"}, error.status_code, headers)
    if error.status_code == 400:
        return error_response(InvalidBody(error.detail))
    if error.status_code >= 500:
        return on_error(request, error)
    return error_response(RequestError(error.detail, status=error.status_code), dialect_of(request))


def on_error(request: AnyRequest, error: Exception) -> Response[bytes]:
    """Any other exception: logged, and the client gets a generic 500; 400 if the body couldn't be decoded."""
    if isinstance(error, RecursionError | msgspec.MsgspecError):
        return error_response(InvalidBody(str(error)))
    where = printable(request.scope["path"])
    log.error("unhandled error on %s (%s): %s", where, owner_of(request), describe_error(error), exc_info=error)
    if dialect_of(request) == "openai":
        return error_response(RequestError("Internal Server Error", status=500), "openai")
    return Response(b"Internal Server Error", status_code=500, media_type="text/plain")


def _under_v1(request: AnyRequest) -> bool:
    """Whether OpenAI's SDKs may call this path. They print error messages in OpenAI's object only."""
    return bool(request.scope["path"].startswith("/v1/"))


def _openai_error(message: str, status: int, code: str | None, headers: dict[str, str]) -> Response[bytes]:
    detail = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    return json_response({"error": detail}, status, headers)


async def add_request_id(message: Message, scope: Scope) -> None:
    """Add ``X-Request-Id``: the id of the request's first sequence, else the client's header, else a new id."""
    if message["type"] != "http.response.start":
        return
    rid = response_id.get()
    response_id.set(None)
    if rid is None:
        given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
        rid = given.decode("latin-1") or uuid.uuid4().hex
    message["headers"] = [*message["headers"], (b"x-request-id", printable(rid).encode())]
