"""The OpenAPI document at ``/openapi.json``, and at ``/docs`` a page made from it that loads nothing from elsewhere."""

from __future__ import annotations

import html
from typing import Any

from litestar import HttpMethod, MediaType, Request, Response, Router, get, route
from litestar.handlers import HTTPRouteHandler
from litestar.openapi.config import OpenAPIConfig
from litestar.openapi.plugins import OpenAPIRenderPlugin
from litestar.response import Redirect

from trunkline.core.server.api.bodies import json_response

from .openapi import Document

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


class JsonPage(OpenAPIRenderPlugin):
    """The OpenAPI document as JSON."""

    def __init__(self, document: Document) -> None:
        super().__init__(path="/openapi.json", media_type=MediaType.JSON)
        self._document = document

    def render(self, request: Request[Any, Any, Any], openapi_schema: dict[str, Any]) -> bytes:
        return self._document(request.app)


def openapi_config(version: str, document: Document) -> OpenAPIConfig:
    """Litestar's OpenAPI settings. Its own pages load scripts from other servers, so they aren't used."""
    router = Router("/docs", route_handlers=[], include_in_schema=False, opt={"scope": "infer"})
    return OpenAPIConfig(
        title="trunkline",
        version=version,
        render_plugins=[DocsPage(), JsonPage(document)],
        openapi_router=router,
        use_handler_docstrings=True,
    )


def docs_routes(document: Document) -> list[HTTPRouteHandler]:
    @get("/openapi.json", opt={"scope": "infer"}, include_in_schema=False)
    async def openapi(request: Request[Any, Any, Any]) -> Response[bytes]:
        return Response(document(request.app), media_type=MediaType.JSON)

    methods = [HttpMethod.GET, HttpMethod.HEAD]

    @route("/", http_method=methods, opt={"scope": "public"}, include_in_schema=False, status_code=200)
    async def root(request: Request[Any, Any, Any]) -> Response[Any]:
        """Sends browsers to the documentation and tells others where it is."""
        if "text/html" in request.headers.get("accept", ""):
            return Redirect("/docs")
        return json_response({"server": "trunkline", "docs": "/docs", "openapi": "/openapi.json"})

    return [openapi, root]
