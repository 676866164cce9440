"""Core's own routes, over a real port."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest

from trunkline.core.server.control import FLUSHED, Lifecycle


def client(port: int, **headers: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=30)


async def test_health_is_empty_and_follows_the_lifecycle(live: Callable[..., Any]) -> None:
    lifecycle = Lifecycle(warm=False)
    _, port = await live(lifecycle=lifecycle)
    async with client(port) as http:
        for path in ("/health", "/ready", "/health_generate"):
            assert (await http.get(path)).status_code == 503
        lifecycle.warm = True
        for path in ("/health", "/ready", "/health_generate", "/ping"):
            answer = await http.get(path)
            assert (answer.status_code, answer.content) == (200, b"")
            assert (await http.head(path)).status_code == 200
        lifecycle.draining = True
        assert (await http.get("/health")).status_code == 503
        assert (await http.get("/ping")).status_code == 200
        refused = await http.post("/echo", json={"ids": [1]})
        assert refused.status_code == 503
        assert "retry-after" in refused.headers


async def test_health_generate_counts_running_output_as_life(live: Callable[..., Any]) -> None:
    engine, port = await live()
    engine.call = lambda *_, **__: asyncio.Event().wait()  # a probe that is never answered
    async with client(port) as http:
        running = asyncio.create_task(http.post("/echo", json={"ids": [1], "n": 100, "delay": 0.02}))
        assert (await http.get("/health_generate")).status_code == 200
        running.cancel()


async def test_model_info_has_exactly_five_keys(live: Callable[..., Any]) -> None:
    _, port = await live({"model_path": "m", "served_model_name": "em"})
    async with client(port, authorization="Bearer None") as http:
        info = (await http.get("/get_model_info")).json()
        assert info == {
            "model_path": "m",
            "is_generation": True,
            "tokenizer_path": "m",
            "preferred_sampling_params": '{"n": 1}',
            "weight_version": "default",
        }
        longer = (await http.get("/model_info")).json()
        assert longer["preferred_sampling_params"] == {"n": 1}
        assert longer["tasks"] == ["echo"]
        assert (await http.get("/get_weight_version")).json() == {"weight_version": "default"}


async def test_models_are_listed_in_openai_style(live: Callable[..., Any]) -> None:
    _, port = await live({"model_path": "org/one"}, {"model_path": "two"})
    async with client(port) as http:
        listed = (await http.get("/v1/models")).json()
        assert listed["object"] == "list"
        assert [card["id"] for card in listed["data"]] == ["org/one", "two"]
        assert listed["data"][0]["max_model_len"] == 512
        assert (await http.get("/v1/models/org/one")).json() == listed["data"][0]
        missing = await http.get("/v1/models/org/three")
        assert missing.status_code == 404
        assert missing.json() == {
            "error": {
                "message": "The model 'org/three' does not exist",
                "type": "invalid_request_error",
                "param": "model",
                "code": "model_not_found",
            }
        }
        assert (await http.get("/get_model_info?model=two")).json()["model_path"] == "two"
        assert (await http.get("/get_model_info?model=three")).status_code == 400


@pytest.mark.field
async def test_with_one_model_any_name_is_that_model(live: Callable[..., Any]) -> None:
    _, port = await live({"model_path": "org/one"})
    async with client(port) as http:
        for name in ("org/one", "gpt-4o", "text-embedding-3-small", "/folder/x"):
            answer = await http.get(f"/v1/models/{name}")
            assert (answer.status_code, answer.json()["id"]) == (200, "org/one")
        for path in ("/get_model_info", "/model_info", "/server_info", "/get_server_info", "/get_weight_version"):
            assert (await http.get(path, params={"model": "gpt-4o"})).status_code == 200


@pytest.mark.field
async def test_calls_about_a_model_take_default_for_no_name(live: Callable[..., Any]) -> None:
    _, port = await live({"model_path": "one"}, {"model_path": "two"})
    async with client(port) as http:
        for name, expected in (("default", "one"), ("unknown", "one"), ("dummy", "one"), ("two", "two")):
            for path in ("/get_model_info", "/model_info", "/server_info", "/get_server_info"):
                assert (await http.get(path, params={"model": name})).json()["model_path"] == expected
            assert (await http.get("/get_weight_version", params={"model": name})).status_code == 200
            assert (await http.post("/flush_cache", params={"model": name})).status_code == 200
        assert "there are: one, two" in (await http.post("/flush_cache?model=three")).json()["error"]["message"]
        for name in ("default", "three"):
            assert (await http.get(f"/v1/models/{name}")).status_code == 404


@pytest.mark.field
async def test_a_model_that_is_called_by_its_folder_is_found(live: Callable[..., Any]) -> None:
    _, port = await live({"model_path": "/models/one"}, {"model_path": "/models/two"})
    async with openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none") as sdk:
        assert (await sdk.models.retrieve("/models/two")).id == "/models/two"
        with pytest.raises(openai.NotFoundError, match="The model 'models/three' does not exist"):
            await sdk.models.retrieve("/models/three")


async def test_server_info_hides_keys(live: Callable[..., Any]) -> None:
    _, port = await live(api_key="secret-1", admin_api_key="secret-2")
    async with client(port, authorization="Bearer secret-1") as http:
        for path in ("/get_server_info", "/server_info"):
            answer = await http.get(path)
            assert "secret-" not in answer.text
            info = answer.json()
            assert info["max_total_num_tokens"] == 1000
            assert info["api_key"] == "***"
            assert info["status"] == "ready"
            assert info["schedule_policy"] == "lpm"
            assert info["preferred_sampling_params"] == '{"n": 1}'
            assert isinstance(info["version"], str)
            assert isinstance(info["internal_states"][0]["last_gen_throughput"], float)


async def test_flush_says_what_sglang_says(live: Callable[..., Any]) -> None:
    _, port = await live()
    async with client(port) as http:
        for method in ("GET", "POST"):
            answer = await http.request(method, "/flush_cache", headers={"content-type": "application/json"})
            assert (answer.status_code, answer.text) == (200, FLUSHED)
        busy = asyncio.create_task(http.post("/echo", json={"ids": [1], "queue": 1.0}))
        await asyncio.sleep(0.3)
        answer = await http.post("/flush_cache")
        assert (answer.status_code, answer.text) == (400, "Flush cache failed.\n")
        answer = await http.post("/flush_cache?timeout=0.1")
        assert (answer.status_code, answer.text) == (400, "Timed out waiting for idle state.")
        both = await asyncio.gather(http.post("/flush_cache?timeout=20"), http.post("/flush_cache?timeout=20"))
        assert sorted(answer.status_code for answer in both) == [200, 400]
        assert "Another flush_cache is already in progress." in {answer.text for answer in both}
        await busy


@pytest.mark.parametrize("timeout", ["-1", "x", "nan", "inf", "1e9", ""])
async def test_flush_refuses_odd_timeouts(live: Callable[..., Any], timeout: str) -> None:
    _, port = await live()
    async with client(port) as http:
        answer = await http.post(f"/flush_cache?timeout={timeout}")
        assert answer.status_code == 400
        assert answer.json()["type"] == "Bad Request"


async def test_abort_answers_the_aborted_with_what_they_have(live: Callable[..., Any]) -> None:
    engine, port = await live()
    async with client(port) as http:
        slow = asyncio.create_task(http.post("/echo", json={"ids": [1], "n": 1000, "delay": 0.01, "rid": "x_1"}))
        while not engine.status.results:
            await asyncio.sleep(0.01)
        for body in ({}, {"rid": ""}, {"rid": None}, {"rid": "unknown"}):
            answer = await http.post("/abort_request", json=body)
            assert (answer.status_code, answer.content) == (200, b"")
        assert not slow.done()
        await http.post("/abort_request", json={"rid": "x"})
        aborted = await slow
        assert aborted.status_code == 200
        assert aborted.json()[0]["finish"]["type"] == "abort"
        assert aborted.json()[0]["ids"]
        assert (await http.post("/abort_request")).status_code == 400


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


@pytest.mark.field
@pytest.mark.parametrize(
    ("path", "field", "most"),
    [
        ("/update_weight_version", "new_version", 256),
        ("/update_weights_from_disk", "model_path", 4096),
        ("/update_weights_from_disk", "weight_version", 256),
        ("/get_weights_by_name", "name", 1024),
        ("/abort_request", "rid", 1024),
    ],
)
async def test_strings_of_administrators_are_bounded(
    live: Callable[..., Any], path: str, field: str, most: int
) -> None:
    _, port = await live()
    async with client(port) as http:
        body = {"model_path": "m"} | {field: "a" * (most + 1)}
        answer = await http.post(path, json=body)
        assert answer.status_code == 400
        assert f"length <= {most} - at `$.{field}`" in answer.json()["message"]
