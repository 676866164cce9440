"""``serve run trunkline.core.cluster:build``: the front in an actor, behind Ray's HTTP proxy."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

pytestmark = pytest.mark.ray

RUN = """
import sys
import ray
from ray import serve
from trunkline.core.cluster import build
ray.init(num_cpus=4, include_dashboard=False)
serve.start(http_options={"port": int(sys.argv[1])})
serve.run(build(dict(argument.split("=", 1) for argument in sys.argv[2:])), blocking=True)
"""


def test_requests_through_rays_proxy(python: Path, zoo: Callable[[str], Path], tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    arguments = [f"model={zoo('llama')}", "served_model_name=tiny", "dtype=float32", "threads=1", "replicas=1"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [str(python), "-c", RUN, str(port), *arguments], stdout=log, stderr=subprocess.STDOUT, env=os.environ
        )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
            deadline = time.monotonic() + 200
            while True:
                assert process.poll() is None, (tmp_path / "log").read_text()
                assert time.monotonic() < deadline, (tmp_path / "log").read_text()
                try:
                    if http.get("/health").status_code == 200:
                        break
                except httpx.HTTPError:
                    pass
                time.sleep(0.2)
            body = {"input_ids": [5, 6, 7], "sampling_params": {"max_new_tokens": 4, "temperature": 0}}
            whole = http.post("/generate", json=body).json()
            assert whole["meta_info"]["completion_tokens"] == 4
            with http.stream("POST", "/generate", json=body | {"stream": True}) as answer:
                frames = [line for line in answer.iter_lines() if line.startswith("data: {")]
            assert whole["text"] in frames[-1]
            assert [model["id"] for model in http.get("/v1/models").json()["data"]] == ["tiny"]
            assert http.post("/generate", json={"input_ids": "x"}).status_code == 400
            assert http.post("/flush_cache").status_code == 200
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        finally:
            process.kill()
