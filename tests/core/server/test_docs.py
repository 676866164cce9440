"""``/docs`` and ``/openapi.json``, over a real port."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest


def client(port: int, **headers: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=30)


@pytest.mark.field
async def test_a_browser_is_sent_to_the_docs(live: Callable[..., Any]) -> None:
    _, port = await live(api_key="k")
    async with client(port) as http:
        browser = await http.get("/", headers={"accept": "text/html,application/xhtml+xml,*/*;q=0.8"})
        assert (browser.status_code, browser.headers["location"]) == (302, "/docs")
        other = await http.get("/")
        assert (other.status_code, other.json()["docs"]) == (200, "/docs")
        assert (await http.head("/")).status_code == 200


async def test_docs_work_without_network(live: Callable[..., Any]) -> None:
    _, port = await live()
    async with client(port) as http:
        schema = (await http.get("/openapi.json")).json()
        assert schema["openapi"].startswith("3.")
        body = schema["paths"]["/echo"]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert body == {"$ref": "#/components/schemas/EchoBody"}
        assert "ids" in schema["components"]["schemas"]["EchoBody"]["properties"]
        assert "/flush_cache" in schema["paths"]
        page = await http.get("/docs")
        assert page.headers["content-type"].startswith("text/html")
        assert "/echo" in page.text
        assert "Says it again." in page.text
        assert "//" not in page.text.replace("<!doctype html>", "")
