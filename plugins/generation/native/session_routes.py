"""``/open_session`` and ``/close_session``."""

from __future__ import annotations

from typing import Any

from litestar import Response, route
from litestar.enums import HttpMethod

from trunkline.core.server.api import TEXT, AnyRequest, json_response, read_body

from .body_schemas import CloseSessionBody, OpenSessionBody
from .sessions import Sessions

METHODS = [HttpMethod.GET, HttpMethod.POST]


def session_routes(sessions: Sessions) -> list[Any]:
    """The handlers that open and close sessions."""
    infer = {"scope": "infer", "dialect": "native"}

    @route("/open_session", http_method=METHODS, opt=infer | {"body": OpenSessionBody, "replies": str}, status_code=200)
    async def open_session(request: AnyRequest) -> Response[Any]:
        """Open a session; the reply is its id. Requests name it in ``session_params`` to continue earlier ones."""
        body = await read_body(request, OpenSessionBody)
        session_id = sessions.open(body.session_id, streaming=bool(body.streaming), idle_timeout=body.timeout)
        return json_response(session_id)

    closing = infer | {"body": CloseSessionBody, "replies": {200: None}}

    @route("/close_session", http_method=METHODS, opt=closing, status_code=200)
    async def close_session(request: AnyRequest) -> Response[Any]:
        """Close a session. Its running requests continue."""
        body = await read_body(request, CloseSessionBody)
        sessions.close(body.session_id)
        return Response(b"", media_type=TEXT)

    return [open_session, close_session]
