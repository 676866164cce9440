"""Builds ``/openapi.json`` from Litestar's document and from the declarations of handlers in ``opt``.

Besides ``scope`` and ``dialect``, a handler declares

* ``body``: the Struct that it reads with ``read_body``; ``body_required``: False where it may be missing
* ``raw_body``: the media type of a body that isn't JSON
* ``query``: a Struct with its query parameters
* ``replies``: types of its replies by status and media type. A single type is JSON with status 200, a tuple has
  alternatives, None is an empty body; for an event stream, the type is that of an event's data
* ``reply_headers``: headers of its replies, by status: name -> description
* ``replicas``: how replies of several engine replicas are merged, see :mod:`.replicas`

for example ``opt={"scope": "infer", "body": ShoutBody, "replies": {200: {JSON: Shout, SSE: Shout}}}``. The errors of
all routes of the same scope and dialect are added here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import msgspec
from litestar import Litestar
from litestar.handlers import HTTPRouteHandler

from trunkline.core.server.api.media_types import JSON, SSE, TEXT
from trunkline.core.server.api.reply_schemas import FlatError, NativeError, OpenAIError, Unauthorized

SCHEMAS = "#/components/schemas/{name}"
STRING, INTEGER = {"type": "string"}, {"type": "integer"}
REQUEST_ID = {"X-Request-Id": {"schema": STRING, "description": "Id of the request, as in the server's log."}}
HEADERS: dict[int, dict[str, Any]] = {
    401: {"WWW-Authenticate": {"schema": STRING}},
    503: {"Retry-After": {"schema": INTEGER, "description": "Seconds after which to try again."}},
}
PHRASES = {499: "Request aborted"}  # statuses that http.HTTPStatus doesn't know
DONE = {"const": "[DONE]", "description": "The end of a stream that has one."}

Content = dict[str, tuple[Any, ...]]  # media type -> alternative types of the body


class Document:
    """The OpenAPI document of an application, built at the first request for it."""

    def __init__(self, locked: Mapping[str, bool]) -> None:
        """``locked``: scope -> whether it needs a key."""
        self._locked = locked
        self._json: bytes | None = None

    def __call__(self, app: Litestar) -> bytes:
        """The document as JSON."""
        if self._json is None:
            self._json = json.dumps(complete_document(app, self._locked)).encode()
        return self._json


def complete_document(app: Litestar, locked: Mapping[str, bool]) -> dict[str, Any]:
    """Litestar's document, completed by the handlers' declarations."""
    document: dict[str, Any] = deepcopy(app.openapi_schema.to_schema())
    operations = [
        Operation(document["paths"][route.path_format][method.lower()], route.path_format, handler)
        for route in app.routes
        for handler in getattr(route, "route_handlers", ())
        for method in handler.http_methods
        if method.lower() in document["paths"].get(route.path_format, ())
    ]
    kinds = list(dict.fromkeys(kind for operation in operations for kind in operation.kinds()))
    schemas, components = msgspec.json.schema_components(kinds, ref_template=SCHEMAS)
    document.setdefault("components", {}).setdefault("schemas", {}).update(components)
    document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for operation in operations:
        operation.complete(dict(zip(kinds, schemas, strict=True)))
        if locked.get(operation.scope, False):
            operation.item["security"] = [{"key": []}]
    return document


@dataclass(frozen=True, slots=True)
class Operation:
    """A path and method. ``item`` is its part of the document."""

    item: dict[str, Any]
    path: str
    handler: HTTPRouteHandler

    @property
    def scope(self) -> str:
        return str(self.handler.opt.get("scope", "admin"))

    def kinds(self) -> Iterator[Any]:
        """All types in the declarations of the handler and in its errors."""
        yield from kinds_of(self.handler)
        for content in self.errors().values():
            for kinds in content.values():
                yield from kinds

    def errors(self) -> dict[int, Content]:
        """The errors of a route of this scope and dialect."""
        if self.scope == "public":
            return {}
        opt = self.handler.opt
        openai = opt.get("dialect") == "openai"
        body = "body" in opt or "raw_body" in opt or "requestBody" in self.item
        own: Any = FlatError if openai else NativeError
        found: dict[int, Content] = {
            401: {JSON: (OpenAIError if self.path.startswith("/v1/") else Unauthorized,)},
            500: {JSON: (FlatError,)} if openai else {JSON: (FlatError,), TEXT: (str,)},
            503: {JSON: (FlatError,)},
        }
        if self.scope == "admin":
            found[403] = {JSON: (own,)}
        if body or "query" in opt or self.item.get("parameters"):
            found[400] = {JSON: (own, FlatError)}
        if openai and (body or self.item.get("parameters")):
            found[404] = {JSON: (OpenAIError,)}
        if body:
            found |= {408: {JSON: (own,)}, 413: {JSON: (own,)}}
        if body and self.scope == "infer":
            found[499] = {JSON: (own,)}
        return found

    def complete(self, schemas: Mapping[Any, dict[str, Any]]) -> None:
        """Add the handler's declarations to ``item``; ``schemas`` has the schema of each of :meth:`kinds`."""
        opt, item = self.handler.opt, self.item
        errors = self.errors()
        if "raw_body" in opt:
            raw = {"schema": {"type": "string", "format": "binary"}}
            item["requestBody"] = {"required": True, "content": {opt["raw_body"]: raw}}
        parameters = [_of_path(parameter) for parameter in item.get("parameters", ())]
        parameters += _of_query(opt["query"]) if "query" in opt else []
        if parameters:
            item["parameters"] = parameters
        if "body" in opt:
            body = {JSON: {"schema": schemas[opt["body"]]}}
            item["requestBody"] = {"required": opt.get("body_required", True), "content": body}
        own = replies_of(self.handler)
        answers = {} if own else {status: item["responses"][status] for status in item["responses"] if status < "3"}
        for status, content in sorted(_merged(own, errors).items()):
            answers[str(status)] = _response(status, content, schemas)
        for status, answer in answers.items():
            more = opt.get("reply_headers", {}).get(int(status), {})
            named = {name: {"schema": STRING, "description": about} for name, about in more.items()}
            answer["headers"] = {**answer.get("headers", {}), **REQUEST_ID, **HEADERS.get(int(status), {}), **named}
        item["responses"] = answers


def check_declarations(handler: HTTPRouteHandler) -> None:
    """Raises (various exceptions) when a handler's declarations can't be described."""
    msgspec.json.schema_components(kinds_of(handler))
    if "query" in handler.opt:
        _of_query(handler.opt["query"])


def kinds_of(handler: HTTPRouteHandler) -> Iterator[Any]:
    """The types of the bodies that a handler declares."""
    if "body" in handler.opt:
        yield handler.opt["body"]
    for content in replies_of(handler).values():
        for kinds in content.values():
            yield from kinds


def replies_of(handler: HTTPRouteHandler) -> dict[int, Content]:
    """The declared replies of a handler by status; {} if it declares none and Litestar describes them."""
    declared = handler.opt.get("replies", {})
    by_status = declared if isinstance(declared, Mapping) else {200: declared}
    return {int(status): _content(content) for status, content in by_status.items()}


def _content(declared: Any) -> Content:
    if declared is None:
        return {}
    by_media = declared if isinstance(declared, Mapping) else {JSON: declared}
    return {media: kinds if isinstance(kinds, tuple) else (kinds,) for media, kinds in by_media.items()}


def _merged(first: dict[int, Content], second: dict[int, Content]) -> dict[int, Content]:
    """The union of both; alternatives of the same status and media type are joined."""
    merged = {status: dict(content) for status, content in first.items()}
    for status, content in second.items():
        known = merged.setdefault(status, {})
        for media, kinds in content.items():
            known[media] = tuple(dict.fromkeys((*known.get(media, ()), *kinds)))
    return merged


def _response(status: int, content: Content, schemas: Mapping[Any, dict[str, Any]]) -> dict[str, Any]:
    response: dict[str, Any] = {"description": PHRASES.get(status) or HTTPStatus(status).phrase}
    if content:
        response["content"] = {
            media: {"schema": _schema(media, [schemas[kind] for kind in kinds])} for media, kinds in content.items()
        }
    return response


def _schema(media: str, schemas: list[dict[str, Any]]) -> dict[str, Any]:
    """The schema of a body, or of each event in an event stream."""
    schema = schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
    if media != SSE:
        return schema
    data = {**STRING, "contentMediaType": JSON, "contentSchema": schema}
    return {"type": "object", "required": ["data"], "properties": {"data": {"anyOf": [data, DONE]}}}


def _of_path(parameter: dict[str, Any]) -> dict[str, Any]:
    """Litestar's description of a parameter; a path with slashes is made a string, not a URI."""
    return {**parameter, "schema": STRING} if parameter["in"] == "path" else parameter


def _of_query(kind: Any) -> list[dict[str, Any]]:
    """A parameter for each field of a Struct."""
    _, components = msgspec.json.schema_components([kind])
    parameters = []
    for name, schema in components[kind.__name__]["properties"].items():
        about = {"description": schema.pop("description")} if "description" in schema else {}
        parameters.append({"name": name, "in": "query", "required": False, **about, "schema": schema})
    return parameters
