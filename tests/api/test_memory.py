"""Memory of a live server that is given back and taken again, as the system counts it."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

LAYERS, WIDTH, VOCABULARY = 4, 768, 512
SLOTS = 4096
POOL_BYTES = LAYERS * 2 * WIDTH * 4 * SLOTS
RELEASE, RESUME = "/release_memory_occupation", "/resume_memory_occupation"
SAMPLING = {"max_new_tokens": 16, "temperature": 0, "ignore_eos": True}
BODY: dict[str, Any] = {"input_ids": list(range(5, 45)), "sampling_params": SAMPLING}


@pytest.fixture(scope="module")
def large(zoo: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A Llama whose weights, of so many bytes in float32, stand out among all else in the process."""
    folder = tmp_path_factory.mktemp("large") / "model"
    shutil.copytree(zoo("llama"), folder)
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=2048, num_hidden_layers=LAYERS,
        num_attention_heads=12, num_key_value_heads=12, max_position_embeddings=512,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    return folder, sum(parameter.nbytes for parameter in model.parameters())


@pytest.fixture(scope="module")
def roomy(large: tuple[Path, int], live: Callable[..., Any]) -> Any:
    options = ["--dtype", "float32", "--max-total-tokens", str(SLOTS), "--threads", "1", "--enable-memory-saver"]
    return live(str(large[0]), *options)


@pytest.mark.parametrize(("tags", "body"), [(["weights"], None), (["kv_cache"], None), (["weights", "kv_cache"], {})])
def test_resident_memory_falls_and_answers_stay(
    large: tuple[Path, int], roomy: Any, tags: list[str], body: Any
) -> None:
    server, weight_bytes = roomy, large[1]
    with httpx.Client(base_url=server.url, timeout=120) as http, ThreadPoolExecutor(1) as pool:
        for start in range(9):  # so that all of the pool is in memory
            ids = [(7 * start + 3 * step) % VOCABULARY for step in range(490)]
            http.post("/generate", json={"input_ids": ids, "sampling_params": SAMPLING | {"max_new_tokens": 1}})
        before = http.post("/generate", json=BODY).json()["output_ids"]
        assert http.post(RELEASE).status_code == 400  # SGLang wants a body
        engine = server.engine()
        full = engine.memory_info().rss
        expected = ("weights" in tags) * weight_bytes + ("kv_cache" in tags) * POOL_BYTES
        assert full > expected
        answer = http.request("GET" if body is None else "POST", RELEASE, json={"tags": tags} if body is None else body)
        assert (answer.status_code, answer.json()) == (200, None)
        assert full - engine.memory_info().rss >= 0.9 * expected
        assert not list(Path(os.environ.get("TRUNKLINE_CACHE", Path.home() / ".cache/trunkline")).glob("tmp*"))
        assert http.get("/health_generate").status_code == 200
        hanging = pool.submit(lambda: httpx.post(f"{server.url}/generate", json=BODY, timeout=120))
        time.sleep(0.3)
        assert not hanging.done()
        assert http.post(RESUME, json={}).json() is None
        after = hanging.result(60).json()
        assert after["output_ids"] == before
        assert http.post("/generate", json=BODY).json()["output_ids"] == before
        for wrong in ({"tags": ["graphs"]}, {"tags": "weights"}, []):
            refused = http.post(RELEASE, json=wrong)
            assert (refused.status_code, refused.json()["type"]) == (400, "Bad Request")


def test_a_server_without_its_memory_drains_at_once(launch: Callable[..., Any]) -> None:
    """What waits can't be computed: it is told so, instead of at the end of --drain-timeout."""
    server = launch()
    server.wait()
    with httpx.Client(base_url=server.url, timeout=120) as http, ThreadPoolExecutor(1) as pool:
        assert http.post(RELEASE, json={"tags": None}).status_code == 200
        hanging = pool.submit(lambda: httpx.post(f"{server.url}/generate", json=BODY, timeout=120))
        time.sleep(0.5)
        began = time.monotonic()
        assert server.terminate() == 0
        assert time.monotonic() - began < 25
        answer = hanging.result(10)
        assert (answer.status_code, answer.json()["type"]) == (503, "503")


def test_busy_is_said_in_sglangs_words(server: Any, http: httpx.Client) -> None:
    long = BODY | {"sampling_params": SAMPLING | {"max_new_tokens": 400}}
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(lambda: httpx.post(f"{server.url}/generate", json=long | {"rid": "long"}, timeout=120))
        while not http.get("/get_server_info").json()["internal_states"][0]["num_running_reqs"] and not running.done():
            time.sleep(0.01)
        answer = http.post(RELEASE, json={})
        if not running.done():
            words = "release_memory_occupation should be called only when server is idle."
            assert (answer.status_code, answer.json()) == (400, {"error": {"message": words}})
        http.post("/abort_request", json={"rid": "long"})
        running.result(60)
    assert http.post(RESUME, json={"tags": ["weights", "kv_cache"]}).status_code == 200
    assert http.post("/generate", json=BODY).status_code == 200
