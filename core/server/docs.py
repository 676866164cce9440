"""OpenAPI at ``/openapi.json`` and a page made from it at ``/docs``, which needs no network."""

from __future__ import annotations

import html
from typing import Any

import msgspec
from litestar import HttpMethod, Request, Response, Router, get, route
from litestar.handlers import HTTPRouteHandler
from litestar.openapi.config import OpenAPIConfig
from litestar.openapi.plugins import OpenAPIRenderPlugin
from litestar.response import Redirect

from .api import json_response

SCHEMAS = "#/components/schemas/{name}"

PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body{{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}}
code{{font-family:ui-monospace,monospace}}td{{padding:.2rem 1rem .2rem 0;vertical-align:top}}
</style></head><body><h1>{title}</h1><p>Version {version} · <a href="/openapi.json">openapi.json</a></p>
<table>{rows}</table></body></html>"""


class DocsPage(OpenAPIRenderPlugin):
    """A table of the routes."""

    def __init__(self) -> None:
        super().__init__(path="/")

    def render(self, request: Request[Any, Any, Any], openapi_schema: dict[str, Any]) -> bytes:
        rows = [
            f"<tr><td><code>{html.escape(method.upper())}</code></td><td><code>{html.escape(path)}</code></td>"
            f"<td>{html.escape(str(operation.get('description', '')))}</td></tr>"
            for path, operations in openapi_schema["paths"].items()
            for method, operation in operations.items()
            if isinstance(operation, dict)
        ]
        info = openapi_schema["info"]
        page = PAGE.format(title=html.escape(info["title"]), version=html.escape(info["version"]), rows="\n".join(rows))
        return page.encode()


def openapi_config(version: str) -> OpenAPIConfig:
    """Litestar's settings; its own pages fetch scripts from elsewhere, so they aren't used."""
    router = Router("/docs", route_handlers=[], include_in_schema=False, opt={"scope": "infer"})
    return OpenAPIConfig(
        title="trunkline",
        version=version,
        render_plugins=[DocsPage()],
        openapi_router=router,
        use_handler_docstrings=True,
    )


def docs_routes() -> list[HTTPRouteHandler]:
    @get("/openapi.json", opt={"scope": "infer"}, include_in_schema=False)
    async def openapi(request: Request[Any, Any, Any]) -> Response[bytes]:
        return json_response(describe(request))

    methods = [HttpMethod.GET, HttpMethod.HEAD]

    @route("/", http_method=methods, opt={"scope": "public"}, include_in_schema=False, status_code=200)
    async def root(request: Request[Any, Any, Any]) -> Response[Any]:
        """Sends browsers to the documentation and tells others where it is."""
        if "text/html" in request.headers.get("accept", ""):
            return Redirect("/docs")
        return json_response({"server": "trunkline", "docs": "/docs", "openapi": "/openapi.json"})

    return [openapi, root]


def describe(request: Request[Any, Any, Any]) -> dict[str, Any]:
    """Litestar's schema, with the bodies of handlers that read them with ``read_body``
    (``opt={"body": Struct}``)."""
    schema: dict[str, Any] = request.app.openapi_schema.to_schema()
    components = schema.setdefault("components", {}).setdefault("schemas", {})
    for served in request.app.routes:
        for handler in getattr(served, "route_handlers", ()):
            body = handler.opt.get("body")
            if body is None:
                continue
            (reference,), found = msgspec.json.schema_components([body], ref_template=SCHEMAS)
            components |= found
            for method in handler.http_methods:
                operation = schema["paths"].get(served.path_format, {}).get(method.lower())
                if operation is not None:
                    operation["requestBody"] = {
                        "required": True,
                        "content": {"application/json": {"schema": reference}},
                    }
    return schema
