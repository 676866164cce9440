"""The project's own routes over several engine replicas."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from trunkline.core.commands.plugins import NoEngine
from trunkline.core.config import Config
from trunkline.core.host import Host
from trunkline.core.server.info import InfoReplies
from trunkline.core.server.lifecycle import Lifecycle
from trunkline.core.server.replicas import declared
from trunkline.core.server.routes import routes as core_routes
from trunkline.core.server.routes.admin import FLUSHED
from trunkline.core.server.routes.tensors import tensor_routes
from trunkline.core.server.routes.weights import weight_routes

from .fake_replicas import Replicas, make_app


@pytest.fixture(scope="module")
def made() -> tuple[Replicas, Any]:
    engine = Replicas()
    return engine, make_app(engine)


@pytest.fixture
def engine(made: tuple[Replicas, Any]) -> Replicas:
    made[0].reset()
    return made[0]


@pytest.fixture
async def http(made: tuple[Replicas, Any], engine: Replicas) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(made[1], client=("127.0.0.1", 5))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        yield client


def own_handlers() -> list[Any]:
    host, engine, info = Host.load(), NoEngine(), InfoReplies({}, [], lambda model: {}, lambda model: {})
    settings = Config.load({}, host).settings
    core = [*core_routes(engine, Lifecycle(), info), *weight_routes(engine, None), *tensor_routes(engine, settings)]
    return [*core, *(handler for _, handler in host.routes(engine, settings))]


def test_every_admin_route_of_ours_declares_how_replies_are_merged() -> None:
    modes = {path: declared(handler) for handler in own_handlers() for path in handler.paths}
    scopes = {path: handler.opt for handler in own_handlers() for path in handler.paths}
    assert {path for path, opt in scopes.items() if opt["scope"] == "admin" and "replicas" not in opt} == set()
    repeated = {path for path, mode in modes.items() if mode != "once"}
    assert repeated == {
        *("/flush_cache", "/plugins/{name:str}/enable", "/pause_generation", "/continue_generation"),
        *("/release_memory_occupation", "/resume_memory_occupation", "/start_profile", "/stop_profile", "/slow_down"),
        *("/update_weight_version", "/get_weights_by_name", "/server_info", "/get_server_info"),
    }


async def test_every_replica_flushes(http: httpx.AsyncClient, engine: Replicas) -> None:
    answer = await http.post("/flush_cache")
    assert (answer.status_code, answer.text) == (200, FLUSHED)
    assert sorted(engine.calls) == [(name, "flush_cache") for name in "abc"]
    engine.values["b"] = False
    answer = await http.post("/flush_cache")
    assert (answer.status_code, answer.text) == (400, "Flush cache failed.\n")
    assert answer.headers["x-replica"] == "b"


async def test_abort_is_once_and_weights_are_loaded_by_each(http: httpx.AsyncClient, engine: Replicas) -> None:
    await http.post("/abort_request", json={"rid": "x"})
    assert engine.calls == [(None, "abort"), (None, "abort_requests")]  # of this front, and of others
    bytes_of = {"content": b"weights", "headers": {"content-type": "application/octet-stream"}}
    for path, body in {
        "/update_weights_from_disk": {"json": {"model_path": "m"}},
        "/update_weights_from_tensor": bytes_of,
    }.items():
        engine.refusing = set()
        engine.calls.clear()
        answer = await http.post(path, **body)  # type: ignore[arg-type]
        assert (answer.status_code, answer.json()) == (200, {"success": True, "message": "a"})
        asked = [(control, name) for name, control in engine.calls if control != "tensor_limit"]
        update = asked[0][0]
        assert sorted(asked[:3]) == [(update, name) for name in "abc"]  # loaded by all, before one applies them
        assert sorted(asked[3:]) == [("commit_update", name) for name in "abc"]
        engine.refusing = {"b", "c"}
        answer = await http.post(path, **body)  # type: ignore[arg-type]
        assert (answer.status_code, answer.json()) == (400, {"success": False, "message": "b"})
        assert {control for _, control in engine.calls[-3:]} == {"cancel_update"}


async def test_healthy_if_one_replica_answers(http: httpx.AsyncClient, engine: Replicas) -> None:
    engine.failing = {"a", "c"}
    assert (await http.get("/health_generate")).status_code == 200
    engine.failing = {"a", "b", "c"}
    assert (await http.get("/health_generate")).status_code == 503


async def test_server_info_has_the_state_of_each(http: httpx.AsyncClient) -> None:
    info = (await http.get("/server_info")).json()
    assert info["dp_size"] == 3
    assert [(state["replica"], state["num_running_reqs"]) for state in info["internal_states"]] == [
        ("a", 1), ("b", 2), ("c", 3)
    ]  # fmt: skip
    assert (await http.get("/server_info", params={"model": "m"})).status_code == 200


async def test_loads_have_an_entry_for_each(http: httpx.AsyncClient) -> None:
    loads = (await http.get("/v1/loads")).json()["loads"]
    assert [(load["dp_rank"], load["replica"], load["num_running_reqs"]) for load in loads] == [
        (0, "a", 1), (1, "b", 2), (2, "c", 3)
    ]  # fmt: skip
    [load] = (await http.get("/v1/loads", params={"dp_rank": "1"})).json()["loads"]
    assert load["replica"] == "b"
    old = (await http.get("/get_load")).json()
    assert [(load["dp_rank"], load["num_reqs"]) for load in old] == [(0, 1), (1, 2), (2, 3)]
    text = (await http.get("/v1/loads", params={"format": "prometheus"})).text
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert [sample.labels for sample in families["sglang_num_running_reqs"].samples][1] == {
        "dp_rank": "1", "replica": "b"
    }  # fmt: skip


async def test_replicas_of_other_models_are_left_alone(http: httpx.AsyncClient, engine: Replicas) -> None:
    engine.serve(m=("a", "b"), n=("c",))
    assert (await http.post("/flush_cache?model=n")).status_code == 200
    assert engine.asked == [("c", "flush_cache", "n")]
    engine.asked.clear()
    assert (await http.post("/flush_cache")).status_code == 200
    assert sorted(engine.asked) == [("a", "flush_cache", "m"), ("b", "flush_cache", "m"), ("c", "flush_cache", "n")]
    engine.asked.clear()
    engine.values = {name: {"success": True} for name in "abc"}
    assert (await http.post("/update_weight_version", json={"new_version": "2"})).status_code == 200
    assert sorted(engine.asked) == [(name, "update_weight_version", "m") for name in "ab"]  # of the first model
    answer = await http.post("/flush_cache?model=none")
    assert answer.status_code == 400
    assert "there are: m, n" in answer.text
