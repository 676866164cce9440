"""Who may call what."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest
from litestar import get

from trunkline.core.config import Config
from trunkline.core.discovery import Plugin
from trunkline.core.errors import PluginError
from trunkline.core.host import Host
from trunkline.core.server.app import check_routes, create_app

PUBLIC, INFER, ADMIN = "/health", "/get_model_info", "/flush_cache"


class Engine:
    """As much of an engine as the routes under test ask for."""

    models: list[Any] = []  # noqa: RUF012
    replicas = ()

    async def call(self, control: str, **_: Any) -> bool:
        return True

    async def off_loop(self, function: Callable[..., Any], *args: Any, size: int = 0) -> Any:
        return function(*args)


@pytest.fixture
def statuses(host: Host, configure: Callable[..., Config]) -> Callable[..., Any]:
    """``await statuses(key, headers..., peer=, **server settings)``: of (public, infer, admin)."""

    async def ask(
        key: str | None = None, headers: dict[str, str] | None = None, peer: str = "127.0.0.1", **server: Any
    ) -> tuple[int, ...]:
        @get("/infer", opt={"scope": "infer"})
        async def infer() -> str:
            return "yes"

        app = create_app(Host(), Engine(), configure(**server).settings)
        app.register(infer)
        transport = httpx.ASGITransport(app, client=(peer, 5))
        headers = (headers or {}) | ({"authorization": key} if key else {})
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost:30000", headers=headers) as http:
            return tuple([(await http.get(path)).status_code for path in (PUBLIC, "/infer", ADMIN)])

    return ask


@pytest.mark.parametrize(
    ("server", "key", "expected"),
    [
        ({}, None, (200, 200, 200)),
        ({}, "Bearer None", (200, 200, 200)),
        ({"api_key": "k"}, None, (200, 401, 401)),
        ({"api_key": "k"}, "Bearer k", (200, 200, 200)),
        ({"api_key": "k"}, "bearer k", (200, 200, 200)),
        ({"api_key": "k"}, "Bearer kk", (200, 401, 401)),
        ({"api_key": "k"}, "Bearer ", (200, 401, 401)),
        ({"api_key": "k"}, "Basic k", (200, 401, 401)),
        ({"api_key": "k"}, "Bearer \xff\xfe", (200, 401, 401)),
        ({"api_key": "k", "admin_api_key": "a"}, "Bearer k", (200, 200, 401)),
        ({"api_key": "k", "admin_api_key": "a"}, "Bearer a", (200, 200, 200)),
        ({"admin_api_key": "a"}, None, (200, 200, 401)),
        ({"admin_api_key": "a"}, "Bearer a", (200, 200, 200)),
    ],
)
async def test_keys_open_scopes(
    statuses: Callable[..., Any], server: dict[str, Any], key: str | None, expected: tuple[int, ...]
) -> None:
    headers = {"authorization": key.encode("latin-1")} if key else {}
    assert await statuses(None, headers, **server) == expected


@pytest.mark.parametrize(
    ("headers", "peer", "admin"),
    [
        ({}, "127.0.0.1", 200),
        ({}, "::1", 200),
        ({}, "::ffff:127.0.0.1", 200),
        ({"host": "127.0.0.1:30000"}, "127.0.0.1", 200),
        ({"host": "[::1]:30000"}, "::1", 200),
        ({"origin": "http://localhost:8080"}, "127.0.0.1", 200),
        ({"sec-fetch-site": "same-origin"}, "127.0.0.1", 200),
        ({}, "10.0.0.1", 403),
        ({"host": "evil.example"}, "127.0.0.1", 403),
        ({"host": "localhost.evil.example"}, "127.0.0.1", 403),
        ({"host": ""}, "127.0.0.1", 403),
        ({"host": "[::1"}, "127.0.0.1", 403),
        ({"origin": "http://evil.example"}, "127.0.0.1", 403),
        ({"origin": "null"}, "127.0.0.1", 403),
        ({"sec-fetch-site": "cross-site"}, "127.0.0.1", 403),
        ({"x-forwarded-for": "127.0.0.1"}, "127.0.0.1", 403),
        ({"forwarded": "for=127.0.0.1"}, "127.0.0.1", 403),
    ],
)
async def test_without_keys_admin_is_for_local_callers(
    statuses: Callable[..., Any], headers: dict[str, str], peer: str, admin: int
) -> None:
    assert await statuses(None, headers, peer) == (200, 200, admin)


async def test_a_refusal_names_the_flag(host: Host, configure: Callable[..., Config]) -> None:
    app = create_app(Host(), Engine(), configure().settings)
    transport = httpx.ASGITransport(app, client=("10.0.0.1", 5))
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as http:
        answer = await http.post("/flush_cache")
        assert answer.status_code == 403
        assert "--admin-api-key" in answer.json()["error"]["message"]


async def test_401_has_its_own_shape_and_options_is_open(host: Host, configure: Callable[..., Config]) -> None:
    app = create_app(Host(), Engine(), configure(api_key="k").settings)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as http:
        answer = await http.get("/get_model_info")
        assert (answer.status_code, answer.json()) == (401, {"error": "Unauthorized"})
        assert answer.headers["www-authenticate"] == "Bearer"
        assert (await http.options("/v1/models")).status_code == 204
        for path in ("/openapi.json", "/docs", "/docs/openapi.json"):
            assert (await http.get(path)).status_code == 401


async def test_cors_is_off_unless_origins_are_given(configure: Callable[..., Config]) -> None:
    for origins, header in ((), None), (("http://a.example",), "http://a.example"):
        app = create_app(Host(), Engine(), configure(cors_origins=origins).settings)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as http:
            answer = await http.get("/ping", headers={"origin": "http://a.example"})
            assert answer.headers.get("access-control-allow-origin") == header


def test_a_route_without_scope_stops_start_up(plugin: Callable[..., Plugin], configure: Callable[..., Config]) -> None:
    @get("/loose")
    async def loose() -> None: ...

    host = Host([plugin("careless", trunkline_routes=lambda engine, settings: [loose])])
    with pytest.raises(PluginError, match=r"'careless'.*GET /loose declares no scope"):
        create_app(host, Engine(), configure().settings)


def test_a_path_claimed_twice_names_both() -> None:
    @get("/same", opt={"scope": "infer"})
    async def one() -> None: ...

    @get(["/other", "/same"], opt={"scope": "infer"})
    async def two() -> None: ...

    with pytest.raises(PluginError, match=r"'b'.*GET /same is already a route of plugin 'a'"):
        check_routes([("a", one), ("b", two)])
    with pytest.raises(PluginError, match="must be a Litestar HTTP handler"):
        check_routes([("c", print)])
