"""Routes that show the record while it is made: as JSON, as an event stream and as a page. They don't change it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from litestar import Response, get

from trunkline.core.server.api import (
    HTML,
    SSE,
    AnyRequest,
    EventStream,
    ModelQuery,
    OpenAIError,
    event_frame,
    is_draining,
    json_response,
)

from .page import HEADERS, PAGE
from .reply_schemas import Report
from .report import report
from .schemas import Snapshot
from .service import Service, model_of
from .settings import LOOK

EVENT_SECONDS = 1.0


def live_routes(service: Service) -> list[Any]:
    """The handlers, which use ``service``."""
    admin = {"scope": "admin", "dialect": "native", "replicas": "once", "query": ModelQuery}  # the service adds up
    page_opt = {"scope": "public", "replies": {200: {HTML: str}}}

    @get("/expert_distribution", opt=admin | {"replies": Report}, summary="Expert choices so far")
    async def look(request: AnyRequest) -> Response[Any]:
        """Counts of experts by layer since the last start or dump, with balancedness and the busiest experts."""
        return json_response(report(await service.run(LOOK, model_of(request))))

    @get(
        "/expert_distribution/stream",
        opt=admin | {"replies": {200: {SSE: (Report, OpenAIError)}}},
        summary="Expert choices, about once a second",
    )
    async def stream(request: AnyRequest) -> Response[Any]:
        """The same object as a server-sent event about once a second, until the client or the server disconnects."""
        first = await service.run(LOOK, model_of(request))  # before the stream begins, so that errors have a status
        return EventStream(_events(service, request, first), lambda: None)

    @get("/expert_distribution/page", opt=page_opt, summary="Heat map of experts")
    async def page() -> Response[bytes]:
        """A page that draws the stream as a heat map. It contains no data; it requests them with the key that the user
        enters."""
        return Response(PAGE, media_type=HTML, headers=HEADERS)

    return [look, stream, page]


async def _events(service: Service, request: AnyRequest, first: Snapshot) -> AsyncIterator[bytes]:
    yield event_frame(report(first))
    while not is_draining(request):  # the server must not wait for streams without an end
        await asyncio.sleep(EVENT_SECONDS)
        yield event_frame(report(await service.run(LOOK, model_of(request))))
