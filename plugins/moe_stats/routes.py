"""SGLang's three routes: start, stop and dump the record of expert choices."""

from __future__ import annotations

from typing import Any

from litestar import Response, route
from litestar.enums import HttpMethod

from trunkline.core.server.api import JSON, TEXT, AnyRequest, json_response

from .reply_schemas import ExpertQuery, Report
from .report import report
from .service import Service, model_of, wants_json
from .settings import DUMP, START, STOP

# path -> (control, SGLang's text of the response, description of the route)
RECORD = {
    "/start_expert_distribution_record": (
        START,
        "Start recording the expert distribution.\n",
        "Clear the record and start recording to which experts tokens are sent.",
    ),
    "/stop_expert_distribution_record": (
        STOP,
        "Stop recording the expert distribution.\n",
        "Stop recording; the record is kept.",
    ),
    "/dump_expert_distribution_record": (
        DUMP,
        "Dump expert distribution record.\n",
        "Write the record to a file on the server and clear it.",
    ),
}


def record_routes(service: Service) -> list[Any]:
    """The handlers, which use ``service``."""
    return [_route(service, path, *about) for path, about in RECORD.items()]


def _route(service: Service, path: str, control: str, text: str, about: str) -> Any:
    @route(
        path,
        http_method=[HttpMethod.GET, HttpMethod.POST],
        opt={
            "scope": "admin",
            "dialect": "native",
            "replicas": "once",  # the service adds up
            "query": ExpertQuery,
            "replies": {200: {TEXT: str, JSON: Report}},
        },
        status_code=200,
        summary=text.strip().rstrip("."),
        description=f"{about} Text, or JSON with the counts by `?format=json` or `Accept: application/json`.",
    )
    async def handler(request: AnyRequest) -> Response[Any]:
        as_json = wants_json(request)
        snapshot = await service.run(control, model_of(request))
        if not as_json:
            return Response(text, media_type=TEXT)
        return json_response({"message": text.strip()} | report(snapshot))

    return handler
