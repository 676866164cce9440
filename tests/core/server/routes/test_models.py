"""What is served, over a real port."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest


def client(port: int, **headers: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=30)


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
