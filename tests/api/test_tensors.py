"""Tensors over HTTP, on a live server: bodies of every kind, what is left behind, and an engine that dies."""

from __future__ import annotations

import base64
import http.client
import json
import pickle
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file, save

from trunkline.core.model.sources.catalogue import cache_folder

BODY: dict[str, Any] = {
    "input_ids": list(range(5, 45)),
    "sampling_params": {"max_new_tokens": 8, "temperature": 0, "ignore_eos": True},
}
BYTES = {"content-type": "application/octet-stream"}
ROUTE = "/update_weights_from_tensor"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The server's cache folder, where tensors are received; with the compiled kernels, which take 20 s to make."""
    kernels, folder = cache_folder() / "kernels", tmp_path / "cache"
    folder.mkdir(mode=0o700)
    if kernels.is_dir():
        shutil.copytree(kernels, folder / "kernels")
    monkeypatch.setenv("TRUNKLINE_CACHE", str(folder))
    return folder


@pytest.fixture
def server(cache: Path, launch: Callable[..., Any]) -> Any:
    live = launch("--served-model-name", "tiny", "--weight-version", "disk", "--stream-timeout", "1")
    live.wait()
    return live


@pytest.fixture
def http_client(server: Any) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=120) as client:
        yield client


def ids(client: httpx.Client) -> tuple[list[int], str]:
    answer = client.post("/generate", json=BODY).json()
    return answer["output_ids"], answer["meta_info"]["weight_version"]


def test_tensors_over_http(
    server: Any, http_client: httpx.Client, cache: Path, other: Callable[[str], Path], checkpoint: Path
) -> None:
    client = http_client
    tensors = load_file(other("llama") / "model.safetensors")
    before, _ = ids(client)

    def left() -> list[Path]:
        return list(cache.glob("weights-*"))

    # What is refused, and changes nothing.
    pickled = base64.b64encode(pickle.dumps([("a", torch.ones(1))])).decode()
    for body in ({"serialized_named_tensors": [pickled]}, {}):
        answer = client.post(ROUTE, json=body)
        assert (answer.status_code, answer.json()["success"]) == (400, False)
        assert "safetensors" in answer.json()["message"]
        assert "never read" in answer.json()["message"]
    for content, headers, status, words in (
        (pickle.dumps({"a": 1}), BYTES, 400, "is no safetensors file"),
        (b"", BYTES, 400, "is no safetensors file"),
        (save(tensors), {"content-type": "text/plain"}, 400, "octet-stream"),
        (save({"strange": torch.ones(3)}), BYTES, 400, "strange is none of the checkpoint's tensors"),
    ):
        answer = client.post(ROUTE, content=content, headers=headers)
        assert (answer.status_code, answer.json()["success"]) == (status, False), answer.text
        assert words in answer.json()["message"]
    assert client.post(f"{ROUTE}?weight_version={'x' * 257}", content=b"", headers=BYTES).status_code == 400
    assert client.post(f"{ROUTE}?abort_all_requests=perhaps", content=b"", headers=BYTES).status_code == 400
    for route in ("/update_weights_from_distributed", "/init_weights_update_group", "/destroy_weights_update_group"):
        answer = client.post(route, json={})
        assert (answer.status_code, answer.json()["success"]) == (400, False)
        assert "/update_weights_from_disk" in answer.json()["message"]
    too_long = http.client.HTTPConnection("127.0.0.1", server.port)
    too_long.putrequest("POST", ROUTE)
    for name, value in (BYTES | {"content-length": str(1 << 40)}).items():
        too_long.putheader(name, value)
    too_long.endheaders()
    refused = too_long.getresponse()
    assert refused.status == 413
    assert "larger than" in json.loads(refused.read())["message"]
    too_long.close()
    stalled = socket.create_connection(("127.0.0.1", server.port))
    stalled.sendall(
        f"POST {ROUTE} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/octet-stream\r\n"
        "Content-Length: 1000000\r\n\r\nxyz".encode()
    )
    assert b" 408 " in stalled.recv(4096)
    stalled.close()
    gone = socket.create_connection(("127.0.0.1", server.port))
    gone.sendall(
        f"POST {ROUTE} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/octet-stream\r\n"
        "Content-Length: 1000000\r\n\r\nxyz".encode()
    )
    deadline = time.monotonic() + 30
    while not left():
        assert time.monotonic() < deadline
    gone.close()
    while left():
        assert time.monotonic() < deadline, "a client that hung up left a file behind"
    assert ids(client) == (before, "disk")

    # What is taken: larger than --max-body-bytes could be, in chunks of unknown length.
    def pieces() -> Iterator[bytes]:
        content = save(tensors)
        for start in range(0, len(content), 50_000):
            yield content[start : start + 50_000]

    answer = client.post(f"{ROUTE}?weight_version=two&model=tiny", content=pieces(), headers=BYTES)
    assert answer.status_code == 200
    assert answer.json() == {"success": True, "message": "Success Weight version updated to two."}
    after, label = ids(client)
    assert (after != before, label) == (True, "two")
    assert left() == []
    assert client.get("/get_weight_version").json() == {"weight_version": "two"}
    assert client.get("/get_model_info").json()["model_path"] == str(checkpoint)

    # Part of it, and the label stays.
    half = {name: tensor for name, tensor in load_file(checkpoint / "model.safetensors").items() if "layers.0" in name}
    assert client.post(ROUTE, content=save(half), headers=BYTES).json() == {"success": True, "message": "Success"}
    assert ids(client)[1] == "two"

    # An engine that is started again has what is on disk, by its name.
    engine = server.engine()
    engine.kill()
    engine.wait(60)
    deadline = time.monotonic() + 120
    while client.get("/health").status_code != 200:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert ids(client) == (before, "disk")
    assert client.get("/get_weight_version").json() == {"weight_version": "disk"}
    assert "those labelled 'two' were sent and are lost" in server.log.read_text()


def test_only_folders_where_the_operator_says_so(fleet: Any) -> None:
    answer = httpx.post(f"{fleet.url}{ROUTE}", content=save({"a": torch.ones(1)}), headers=BYTES)
    assert (answer.status_code, answer.json()["success"]) == (400, False)
    assert "--allow-weights-dir" in answer.json()["message"]
