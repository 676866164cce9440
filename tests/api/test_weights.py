"""Weights of a live server: replaced from disk, kept over a restart of the engine, looked at."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from trunkline.core import Engine
from trunkline.plugins.embedding.offline import encode

SAMPLING = {"max_new_tokens": 8, "temperature": 0, "ignore_eos": True}
BODY: dict[str, Any] = {"input_ids": list(range(5, 45)), "sampling_params": SAMPLING}
SUCCEEDED = "Succeeded to update model weights."


@pytest.fixture
def new(other: Callable[[str], Path]) -> Path:
    """The served model with other numbers."""
    return other("llama")


def ids(http: httpx.Client, **more: Any) -> list[int]:
    answer = http.post("/generate", json=BODY | more)
    assert answer.status_code == 200, answer.text
    result: list[int] = answer.json()["output_ids"]
    return result


def update(http: httpx.Client, path: Any, route: str = "/update_weights_from_disk", **more: Any) -> httpx.Response:
    return http.post(route, json={"model_path": str(path)} | more)


def test_an_update_is_seen_everywhere_and_survives_the_engine(
    launch: Callable[..., Any], checkpoint: Path, new: Path, tmp_path: Path
) -> None:
    server = launch("--served-model-name", "tiny", "--weight-version", "one")
    server.wait()
    with httpx.Client(base_url=server.url, timeout=120) as http:
        before = ids(http)
        info = http.get("/get_model_info").json()
        for missing in ("nobody/nothing", tmp_path / "nothing"):
            failed = update(http, missing, weight_version="bad")
            assert failed.status_code == 400
            message = f"Failed to get weights iterator: {missing} (repository not found)."
            assert failed.json() == {"success": False, "message": message, "num_paused_requests": 0}
        assert http.get("/get_model_info").json() == info
        assert http.post("/generate", json=BODY).json()["meta_info"]["cached_tokens"] == 39
        assert ids(http) == before
        invalid = http.post("/update_weights_from_disk", json={})
        assert (invalid.status_code, invalid.json()["type"]) == (400, "Bad Request")

        done = update(http, new, weight_version="two")
        assert done.status_code == 200
        message = f"{SUCCEEDED} Weight version updated to two."
        assert done.json() == {"success": True, "message": message, "num_paused_requests": 0}
        meta = http.post("/generate", json=BODY).json()["meta_info"]
        assert (meta["cached_tokens"], meta["weight_version"]) == (0, "two")
        after = ids(http)
        assert after != before

        def check() -> None:
            assert ids(http) == after == ids(http, model="tiny") == ids(http, model=str(new))
            assert http.get("/get_model_info").json() == info | {"model_path": str(new), "weight_version": "two"}
            state = http.get("/get_server_info").json()
            assert (state["model_path"], state["tokenizer_path"]) == (str(new), str(checkpoint))
            assert state["internal_states"][0]["memory_usage"]["token_capacity"] == state["max_total_num_tokens"]
            assert state["internal_states"][0]["memory_usage"]["kvcache"] > 0
            (card,) = http.get("/v1/models").json()["data"]
            assert card["id"] == str(new)
            assert http.get("/v1/models/tiny").status_code == 200
            assert http.post("/generate", json={"text": "hello", "sampling_params": SAMPLING}).status_code == 200
            chat = {"messages": [{"role": "user", "content": "hello"}], "model": "tiny", "max_tokens": 2}
            assert http.post("/v1/chat/completions", json=chat).json()["metadata"] == {"weight_version": "two"}
            name = "model.layers.0.self_attn.v_proj.weight"
            rows = http.request("GET", "/get_weights_by_name", json={"name": name, "truncate_size": 5}).json()
            assert torch.allclose(torch.tensor(rows), load_file(new / "model.safetensors")[name][:5], atol=1e-2)

        check()
        engine = server.engine()
        engine.kill()
        engine.wait(60)
        deadline = time.monotonic() + 120
        while http.get("/health").status_code != 200:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert server.engine().pid != engine.pid
        check()
        assert update(http, checkpoint, "/update_weights").json()["message"] == SUCCEEDED
        assert ids(http) == before


@pytest.mark.field
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer_config.json"])
def test_a_pipe_in_place_of_a_file_is_refused_at_once(
    server: Any, http: httpx.Client, new: Path, tmp_path: Path, name: str
) -> None:
    """Opening it would wait for a writer that never comes."""
    folder = tmp_path / "new"
    shutil.copytree(new, folder)
    (folder / name).unlink()
    os.mkfifo(folder / name)
    engine, before = server.engine().pid, ids(http)
    refused = update(http, folder)
    assert refused.status_code == 400
    message = refused.json().pop("message")
    assert refused.json() == {"success": False, "message": message, "num_paused_requests": 0}
    assert f"{name} is a pipe, a socket or a device" in message
    assert ids(http) == before
    assert http.get("/health").status_code == 200
    assert server.engine().pid == engine


def test_an_update_under_load_loses_nobody(workbench: Any, new: Path) -> None:
    server = workbench
    with httpx.Client(base_url=server.url, timeout=120) as http:
        before = ids(http)
        assert update(http, new).status_code == 200
        after = ids(http)
        assert update(http, server.arguments[0]).status_code == 200
        answers: list[httpx.Response] = []
        stop = threading.Event()

        def client() -> None:
            with httpx.Client(base_url=server.url, timeout=120) as own:
                while not stop.is_set():
                    answers.append(own.post("/generate", json=BODY))

        threads = [threading.Thread(target=client) for _ in range(4)]
        for thread in threads:
            thread.start()
        engine = server.engine().pid
        versions = ["a", "b", "c", "d"]
        for version, path in zip(versions, [new, server.arguments[0]] * 2, strict=True):
            assert update(http, path, weight_version=version).status_code == 200
        stop.set()
        for thread in threads:
            thread.join()
        assert {answer.status_code for answer in answers} == {200}
        expected = {"default": before, "a": after, "b": before, "c": after, "d": before}
        for answer in answers:
            result = answer.json()
            assert result["output_ids"] == expected[result["meta_info"]["weight_version"]]
            assert result["meta_info"]["finish_reason"]["type"] == "length"
        assert server.engine().pid == engine
        assert http.get("/health").status_code == 200
        assert http.post("/update_weight_version", json={"new_version": "default"}).status_code == 200


def test_labels_allowed_folders_and_bad_names(fleet: Any, new: Path) -> None:
    with httpx.Client(base_url=fleet.url, timeout=120) as http:
        refused = update(http, new)
        message = f"Failed to get weights iterator: {new} (repository not found)."
        assert (refused.status_code, refused.json()["message"]) == (400, message)
        answer = http.post("/update_weight_version", json={"new_version": "x"})
        assert answer.json() == {"success": True, "message": "Weight version updated to x", "new_version": "x"}
        assert http.get("/get_weight_version").json() == {"weight_version": "x"}
        assert http.post("/generate", json=BODY).json()["meta_info"]["weight_version"] == "x"
        assert http.post("/update_weight_version", json={}).status_code == 400
        unknown = http.post("/get_weights_by_name", json={"name": "no.such.tensor"})
        assert unknown.status_code == 400
        assert unknown.json() == {"error": {"message": "Get parameter by name failed"}}
        too_many = http.post("/get_weights_by_name", json={"name": "lm_head.weight", "truncate_size": -1})
        assert too_many.status_code == 400
        assert http.post("/update_weight_version", json={"new_version": "default"}).status_code == 200


def test_a_checkpoint_with_another_recipe_for_vectors(
    live: Callable[..., Any], zoo: Callable[[str], Path], tmp_path: Path
) -> None:
    """Pooling and longest text come with the checkpoint, in the engine as in the front."""
    folder = tmp_path / "cls"
    shutil.copytree(zoo("bert"), folder)
    pooling = {"word_embedding_dimension": 128, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 8}))
    with Engine(str(folder), dtype="float32", threads=1) as engine:
        wanted = encode(engine, ["hello there"])[0]
    server = live(str(zoo("bert")), "--dtype", "float32")
    with httpx.Client(base_url=server.url, timeout=120) as http:
        before = http.post("/encode", json={"text": "hello there"}).json()["embedding"]
        long = {"text": "hello there " * 20}
        assert http.post("/encode", json=long).status_code == 200
        assert http.get("/model_info").json()["pooling"] == ["mean"]
        assert update(http, folder).status_code == 200
        vector = http.post("/encode", json={"text": "hello there"}).json()["embedding"]
        assert np.abs(np.array(before) - wanted).max() > 1e-3
        np.testing.assert_allclose(vector, wanted, atol=1e-5)
        assert http.get("/model_info").json()["pooling"] == ["cls"]
        assert http.post("/encode", json=long).status_code == 400
        assert update(http, zoo("bert")).status_code == 200
        assert http.post("/encode", json=long).status_code == 200
