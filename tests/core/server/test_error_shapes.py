"""The shapes of errors, and bodies that nobody should send."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest

JSON = {"content-type": "application/json"}


@pytest.fixture
async def http(live: Callable[..., Any]) -> Any:
    _, port = await live({"model_path": "a"}, {"model_path": "b"}, max_body_bytes=10_000)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
        yield client
        assert (await client.post("/echo", json={"ids": [1]})).status_code == 200  # no harm was done


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"ids": "x"}',
        b'{"ids": [1e400]}',
        b'{"n": 1}',
        b'{"ids": [1], "rid": "\\ud800"}',
        b'{"ids": ' + b"[" * 4000 + b"]" * 4000 + b"}",
        b'{"unknown": ' + b"[" * 4000 + b"]" * 4000 + b', "ids": [1]}',
    ],
)
async def test_a_body_that_does_not_fit_is_shape_2(http: httpx.AsyncClient, body: bytes) -> None:
    for path in ("/echo", "/v1/echo"):
        answer = await http.post(path, content=body, headers=JSON)
        assert answer.status_code == 400
        error = answer.json()
        assert error.pop("message")
        assert error == {"object": "error", "type": "Bad Request", "param": None, "code": 400}


async def test_scalars_are_taken_laxly_and_unknown_fields_ignored(http: httpx.AsyncClient) -> None:
    body = {"ids": [1.0, 2], "n": "2", "stream": "false", "whatever": {"x": 1}}
    assert (await http.post("/echo", json=body)).json()[0]["ids"] == [1, 2]
    assert (await http.put("/echo", json=body)).status_code == 200


async def test_content_type_is_checked(http: httpx.AsyncClient) -> None:
    native = await http.post("/echo", content=b'{"ids": [1]}', headers={"content-type": "text/plain"})
    assert native.status_code == 400
    assert native.json()["type"] == "Bad Request"
    openai = await http.post("/v1/echo", content=b'{"ids": [1]}')
    assert openai.status_code == 400
    assert openai.json()["message"] == "Unsupported Media Type: Only 'application/json' is allowed"
    assert openai.json()["type"] == "BadRequestError"
    utf8 = await http.post(
        "/echo", content=b'{"ids": [1]}', headers={"content-type": "application/json; charset=utf-8"}
    )
    assert utf8.status_code == 200


async def test_a_long_body_is_413_and_names_the_limit(http: httpx.AsyncClient) -> None:
    async def chunks() -> Any:
        for _ in range(20):
            yield b" " * 1000

    for content in (b" " * 20_000, chunks()):
        answer = await http.post("/echo", content=content, headers=JSON)
        assert answer.status_code == 413
        assert "10000 bytes" in answer.json()["error"]["message"]
        assert "--max-body-bytes" in answer.json()["error"]["message"]


async def test_request_errors_take_the_routes_dialect(http: httpx.AsyncClient) -> None:
    body = {"ids": [1], "refuse": True}
    assert (await http.post("/echo", json=body)).json() == {"error": {"message": "refused"}}
    assert (await http.post("/v1/echo", json=body)).json() == {
        "object": "error",
        "message": "refused",
        "type": "BadRequestError",
        "param": "text",
        "code": 400,
    }
    wrong = await http.post("/wrong")
    assert wrong.status_code == 500
    assert wrong.json() == {"object": "error", "message": "Too odd.", "type": "500", "param": None, "code": 500}


async def test_unknown_models_are_404_for_openai_and_400_natively(http: httpx.AsyncClient) -> None:
    body = {"ids": [1], "model": "c"}
    native = await http.post("/echo", json=body)
    assert native.status_code == 400
    assert "a, b" in native.json()["error"]["message"]
    openai = await http.post("/v1/echo", json=body)
    assert openai.status_code == 404
    assert openai.json()["error"]["code"] == "model_not_found"


async def test_unknown_paths_and_methods_keep_detail(http: httpx.AsyncClient) -> None:
    missing = await http.get("/update_everything")
    assert (missing.status_code, missing.json()) == (404, {"detail": "Not Found"})
    method = await http.get("/echo")
    assert (method.status_code, method.json()) == (405, {"detail": "Method Not Allowed"})
    assert "POST" in method.headers["allow"]


@pytest.mark.field
async def test_unknown_routes_under_v1_are_openais_error_object(http: httpx.AsyncClient) -> None:
    """Its SDKs print the message of that object, and of a body with ``detail`` the status alone."""
    for method, path, status in (("POST", "/v1/responses", 404), ("GET", "/v1/a/b?c=d", 404), ("GET", "/v1/echo", 405)):
        answer = await http.request(method, path)
        assert answer.status_code == status
        route = f"{method} {path.partition('?')[0]}"
        assert answer.json() == {
            "error": {
                "message": f"no route {route} here, see /docs",
                "type": "invalid_request_error",
                "param": None,
                "code": None,
            }
        }
    assert "POST" in answer.headers["allow"]
    assert (await http.get("/v1x")).json() == {"detail": "Not Found"}


@pytest.mark.field
async def test_openais_sdk_prints_what_is_wrong(live: Callable[..., Any]) -> None:
    _, port = await live({"model_path": "a"}, {"model_path": "b"}, api_key="right", max_body_bytes=1000)

    async def said(key: str, call: Callable[[openai.AsyncOpenAI], Any]) -> str:
        base = f"http://127.0.0.1:{port}/v1"
        async with openai.AsyncOpenAI(base_url=base, api_key=key, max_retries=0) as sdk:
            with pytest.raises(openai.APIStatusError) as caught:
                await call(sdk)
        return str(caught.value)

    def echo(sdk: openai.AsyncOpenAI, **body: Any) -> Any:
        return sdk.post("/echo", body={"ids": [1], **body}, cast_to=object)

    assert await said("wrong", lambda sdk: sdk.models.list()) == "Error code: 401 - the API key is wrong"
    unknown = await said("right", lambda sdk: sdk.responses.create(model="a", input="b"))
    assert unknown == "Error code: 404 - no route POST /v1/responses here, see /docs"
    assert "413 - The body is larger" in await said("right", lambda sdk: echo(sdk, rid="x" * 2000))
    assert "400 - refused" in await said("right", lambda sdk: echo(sdk, refuse=True))
    assert "404 - The model 'c' does not exist; there are: a, b" in await said(
        "right", lambda sdk: echo(sdk, model="c")
    )
    assert "500 - Internal Server Error" in await said("right", lambda sdk: sdk.post("/break", body={}, cast_to=object))


@pytest.mark.field
async def test_401_under_v1_says_whether_the_key_is_missing_or_wrong(live: Callable[..., Any]) -> None:
    _, port = await live(api_key="right")
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30) as http:
        for headers, words in (({}, "missing"), ({"authorization": "Bearer x"}, "wrong")):
            answer = await http.get("/v1/models", headers=headers)
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
            error = answer.json()["error"]
            assert f"the API key is {words}" in error.pop("message")
            assert error == {"type": "invalid_request_error", "param": None, "code": "invalid_api_key"}
            native = await http.get("/get_model_info", headers=headers)
            assert (native.status_code, native.json()) == (401, {"error": "Unauthorized"})


async def test_a_bug_is_a_bare_500(http: httpx.AsyncClient) -> None:
    answer = await http.post("/break")
    assert (answer.status_code, answer.text) == (500, "Internal Server Error")
    assert answer.headers["content-type"].startswith("text/plain")


async def test_every_answer_has_a_request_id(http: httpx.AsyncClient) -> None:
    one = await http.post("/echo", json={"ids": [1], "rid": "mine"})
    assert one.headers["x-request-id"] == "mine"
    two = await http.post("/echo", json={"ids": [1], "rid": "a\r\nset-cookie: x ü"})
    assert two.headers["x-request-id"] == "a??set-cookie:?x??"
    assert "set-cookie" not in two.headers
    three = await http.get("/ping", headers={"x-request-id": "theirs"})
    assert three.headers["x-request-id"] == "theirs"
    assert len((await http.get("/nowhere")).headers["x-request-id"]) == 32


async def test_a_queue_that_is_full_is_503_at_once(live: Callable[..., Any]) -> None:
    engine, port = await live(max_queued_requests=2)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30) as http:
        waiting = asyncio.create_task(http.post("/echo", json={"ids": [1], "queue": 30, "copies": 2}))
        while len(engine._live) < 2:
            await asyncio.sleep(0.01)
        full = await http.post("/echo", json={"ids": [1]})
        assert full.status_code == 503
        assert full.headers["retry-after"] == "1"
        assert full.json() == {
            "object": "error",
            "message": "The request queue is full.",
            "type": "503",
            "param": None,
            "code": 503,
        }
        never = await http.post("/echo", json={"ids": [1], "copies": 3})
        assert never.status_code == 400
        engine.abort(everything=True)
        assert (await waiting).status_code == 200
