"""What ``/openapi.json`` makes of the declarations of routes."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Annotated, Any, NotRequired, TypedDict

import httpx
import jsonschema_rs
import pytest
from litestar import Response, get, post
from litestar.params import JSONBody
from msgspec import Meta, Struct

from trunkline.core.config import Config
from trunkline.core.discovery import Plugin
from trunkline.core.errors import EngineDown, PluginError
from trunkline.core.host import Host
from trunkline.core.server.api import JSON, SSE, TEXT
from trunkline.core.server.api.body_limits import run_here
from trunkline.core.server.app import check_routes, create_app


class ShoutBody(Struct):
    text: str


class ShoutQuery(Struct):
    loud: Annotated[bool, Meta(description="Louder.")] = False


class Shouted(TypedDict):
    """A text in capitals."""

    text: str
    times: NotRequired[int]


def other_body() -> type[Struct]:
    """A body of the same name as that of another plugin."""

    class ShoutBody(Struct):
        volume: Annotated[int, Meta(ge=0, le=9)]

    return ShoutBody


def shout_routes() -> list[Any]:
    declared = {"body": ShoutBody, "query": ShoutQuery, "reply_headers": {200: {"X-Loud": "How loud."}}}
    replies = {200: {JSON: (Shouted, list[Shouted]), SSE: Shouted}, 409: {TEXT: str}}

    @post("/shout", opt={"scope": "infer", "replies": replies, **declared}, status_code=200)
    async def shout() -> Response[Any]:
        raise NotImplementedError

    @post("/v1/shout", opt={"scope": "infer", "dialect": "openai", "body": other_body(), "replies": Shouted})
    async def openai() -> Response[Any]:
        raise EngineDown("Gone.")

    @post("/typed", opt={"scope": "admin"}, status_code=200)
    async def typed(data: JSONBody[ShoutBody]) -> dict[str, int]:
        return {"length": len(data.text)}

    @get("/page", opt={"scope": "public", "replies": {200: None}})
    async def page() -> Response[Any]:
        return Response(b"")

    return [shout, openai, typed, page]


@pytest.fixture
def app(plugin: Callable[..., Plugin], configure: Callable[..., Config]) -> Callable[..., Any]:
    def make(**server: Any) -> Any:
        host = Host([plugin("shout", trunkline_routes=lambda engine, settings: shout_routes())])
        engine: Any = SimpleNamespace(models=[], replicas=(), off_loop=run_here)
        return create_app(host, engine, configure(**server).settings)

    return make


async def fetch(app: Any, key: str = "", path: str = "/openapi.json") -> Any:
    headers = {"authorization": f"Bearer {key}"}
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as http:
        return (await http.get(path, headers=headers)).json()


@pytest.mark.field
async def test_a_route_is_described_by_its_declarations(app: Callable[..., Any]) -> None:
    document = await fetch(app())
    shout = document["paths"]["/shout"]["post"]
    assert shout["requestBody"]["content"][JSON]["schema"]["$ref"].endswith("ShoutBody")
    assert shout["parameters"] == [
        {
            "name": "loud",
            "in": "query",
            "required": False,
            "description": "Louder.",
            "schema": {"type": "boolean", "default": False},
        }
    ]
    shouted = {"$ref": "#/components/schemas/Shouted"}
    assert document["components"]["schemas"]["Shouted"]["required"] == ["text"]
    answers = shout["responses"]
    assert answers["200"]["content"][JSON]["schema"] == {"anyOf": [shouted, {"type": "array", "items": shouted}]}
    event = answers["200"]["content"][SSE]["schema"]["properties"]["data"]["anyOf"]
    assert event[0]["contentSchema"] == shouted
    assert event[1]["const"] == "[DONE]"
    assert answers["409"]["content"] == {TEXT: {"schema": {"type": "string"}}}
    assert set(answers["200"]["headers"]) == {"X-Request-Id", "X-Loud"}
    assert set(answers) == {"200", "400", "401", "408", "409", "413", "499", "500", "503"}
    assert set(answers["500"]["content"]) == {JSON, TEXT}
    assert "Retry-After" in answers["503"]["headers"]


@pytest.mark.field
async def test_errors_are_those_of_scope_and_dialect(app: Callable[..., Any]) -> None:
    document = await fetch(app())

    def error(path: str, status: int, method: str = "post") -> str:
        return json.dumps(document["paths"][path][method]["responses"][str(status)]["content"][JSON]["schema"])

    assert "NativeError" in error("/shout", 413)
    assert "FlatError" in error("/v1/shout", 413)
    assert "Unauthorized" in error("/shout", 401)
    assert "OpenAIError" in error("/v1/shout", 401)
    assert "OpenAIError" in error("/v1/shout", 404)
    assert "NativeError" in error("/flush_cache", 403)
    assert set(document["paths"]["/page"]["get"]["responses"]) == {"200"}
    assert "content" not in document["paths"]["/page"]["get"]["responses"]["200"]
    assert set(document["paths"]["/health"]["head"]["responses"]) == {"200", "503"}


@pytest.mark.field
async def test_a_handler_with_litestars_types_keeps_its_own_description(app: Callable[..., Any]) -> None:
    typed = (await fetch(app()))["paths"]["/typed"]["post"]
    assert typed["requestBody"]["content"][JSON]["schema"]
    assert typed["responses"]["200"]["content"][JSON]["schema"]["additionalProperties"] == {"type": "integer"}
    assert {"400", "401", "403", "413", "500", "503"} <= set(typed["responses"])


@pytest.mark.field
async def test_two_plugins_may_have_bodies_of_the_same_name(app: Callable[..., Any]) -> None:
    document = await fetch(app())

    def fields(path: str) -> set[str]:
        reference = document["paths"][path]["post"]["requestBody"]["content"][JSON]["schema"]["$ref"]
        return set(document["components"]["schemas"][reference.rsplit("/", 1)[1]]["properties"])

    assert fields("/shout") == {"text"}
    assert fields("/v1/shout") == {"volume"}


@pytest.mark.field
async def test_the_document_is_valid_and_the_same_under_docs(app: Callable[..., Any]) -> None:
    one = app()
    document = await fetch(one)
    assert await fetch(one, path="/docs/openapi.json") == document
    assert document["openapi"].startswith("3.1")
    ids = [operation["operationId"] for path in document["paths"].values() for operation in path.values()]
    assert len(set(ids)) == len(ids)
    for name, schema in document["components"]["schemas"].items():
        jsonschema_rs.meta.validate(schema | {"$schema": "https://json-schema.org/draft/2020-12/schema"})
        assert "title" in schema, name
    for reference in set(references(document)):
        assert reference.rsplit("/", 1)[1] in document["components"]["schemas"]


def references(value: Any) -> list[str]:
    inner = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
    own = [value["$ref"]] if isinstance(value, dict) and isinstance(value.get("$ref"), str) else []
    return own + [reference for one in inner for reference in references(one)]


@pytest.mark.field
async def test_only_what_is_locked_says_so(app: Callable[..., Any]) -> None:
    for server, locked in (({}, set()), ({"admin_api_key": "a"}, {"admin"}), ({"api_key": "k"}, {"infer", "admin"})):
        document = await fetch(app(**server), key="k")
        operations = {"infer": "/shout", "admin": "/typed"}
        found = {scope for scope, path in operations.items() if "security" in document["paths"][path]["post"]}
        assert found == locked


@pytest.mark.field
@pytest.mark.parametrize("broken", [{"replies": object()}, {"body": 5}, {"query": 7}])
def test_a_declaration_that_cannot_be_described_is_the_plugins_error(broken: dict[str, Any]) -> None:
    @get("/broken", opt={"scope": "infer", **broken})
    async def handler() -> Response[Any]:
        return Response(b"")

    with pytest.raises(PluginError, match="plugin 'shout': GET /broken: its opt declares what can't be described"):
        check_routes([("shout", handler)])


@pytest.mark.field
async def test_real_errors_match_their_description(app: Callable[..., Any]) -> None:
    """401, 404, 503: those that need a server in another state than the rest."""
    one = app(api_key="k")
    document = await fetch(one, key="k")
    async with httpx.AsyncClient(transport=httpx.ASGITransport(one), base_url="http://localhost") as http:
        for path, headers, status in (
            ("/shout", {}, 401),
            ("/v1/shout", {}, 401),
            ("/v1/shout", {"authorization": "Bearer k"}, 503),
        ):
            answer = await http.post(path, json={}, headers=headers)
            assert answer.status_code == status
            schema = document["paths"][path]["post"]["responses"][str(status)]["content"][JSON]["schema"]
            jsonschema_rs.validate(schema | {"components": document["components"]}, answer.json())
