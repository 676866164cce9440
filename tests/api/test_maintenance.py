"""SGLang's small administrative routes on a live server, word by word."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

SAMPLING = {"max_new_tokens": 16, "temperature": 0, "ignore_eos": True}
BODY: dict[str, Any] = {"input_ids": list(range(5, 45)), "sampling_params": SAMPLING}


@pytest.fixture
def client(workbench: Any) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=workbench.url, timeout=120) as client:
        yield client


def generate(client: httpx.Client, **more: Any) -> list[int]:
    answer = client.post("/generate", json=BODY | more)
    assert answer.status_code == 200
    ids: list[int] = answer.json()["output_ids"]
    assert client.post("/flush_cache?timeout=20").status_code == 200  # a reply comes before its pass has ended
    return ids


def test_profiles(client: httpx.Client, profiles: Path) -> None:
    before, kept = generate(client), set(profiles.iterdir())
    started = client.get("/start_profile")  # as SGLang's RuntimeEndpoint calls it
    assert (started.status_code, started.text) == (200, "Start profiling.\n")
    again = client.post("/start_profile", json={"activities": ["CPU", "GPU"], "output_dir": "/etc", "num_steps": "5"})
    assert again.status_code == 400
    assert again.json() == {"error": {"message": "Profiling is already in progress. Call /stop_profile first."}}
    assert generate(client) == before
    stopped = client.post("/stop_profile", json={})
    assert (stopped.status_code, stopped.text) == (200, "Stop profiling. This will take some time.\n")
    assert len(set(profiles.iterdir()) - kept) == 1
    assert client.post("/stop_profile").status_code == 400
    # As SGLang's benchmark calls it.
    body = {
        "activities": ["CPU", "MEM"], "num_steps": "5", "profile_by_stage": None, "profile_stages": None,
        "output_dir": "/nowhere/1", "profile_prefix": "x",
    }  # fmt: skip
    assert client.post("/start_profile", json=body).text == "Start profiling.\n"
    generate(client)
    assert len(set(profiles.iterdir()) - kept) == 2
    assert all(path.name.endswith(".trace.json.gz") for path in profiles.iterdir())
    for wrong in ({"num_steps": "many"}, {"num_steps": -1}, {"activities": "CPU"}):
        assert client.post("/start_profile", json=wrong).json()["type"] == "Bad Request"
    assert client.get("/health").status_code == 200


def test_freeze_and_slow_down(client: httpx.Client) -> None:
    for method in ("GET", "POST"):
        frozen = client.request(method, "/freeze_gc")
        assert (frozen.status_code, frozen.text) == (200, "Garbage collection frozen.\n")
    answer = client.post("/slow_down", json={"forward_sleep_time": 0.05})
    assert (answer.status_code, answer.json()) == (200, None)
    began = time.monotonic()
    generate(client)
    assert time.monotonic() - began > 0.75
    assert client.request("GET", "/slow_down", json={"forward_sleep_time": None}).json() is None
    for wrong in ({"forward_sleep_time": 11}, {"forward_sleep_time": "long"}):
        assert client.post("/slow_down", json=wrong).status_code == 400
    assert client.post("/slow_down").status_code == 400


def test_logging(client: httpx.Client, workbench: Any) -> None:
    def logged(rid: str) -> bool:
        generate(client, rid=rid)
        return f"rid={rid} " in workbench.log.read_text()

    assert logged("first")
    answer = client.post("/configure_logging", json={"log_requests": False, "log_requests_level": 2})
    assert (answer.status_code, answer.content) == (200, b"")
    assert not logged("second")
    client.post("/configure_logging", json={"log_requests": True})
    assert logged("third")
    assert client.post("/configure_logging", json={"log_level": "WARNING"}).status_code == 200
    before = workbench.log.read_text().count("Decode batch")
    assert not logged("fourth")
    assert workbench.log.read_text().count("Decode batch") == before
    client.post("/configure_logging", json={"log_level": "info"})
    assert logged("fifth")
    assert workbench.log.read_text().count("Decode batch") > before
    for wrong, status in (
        ({"log_level": "loud"}, 400), ({"dump_requests_folder": "/tmp"}, 400), ({"crash_dump_folder": "/tmp"}, 400),
        ({}, 200), ({"dump_requests_folder": None, "unknown": 1}, 200),
    ):  # fmt: skip
        assert client.post("/configure_logging", json=wrong).status_code == status
    assert client.post("/configure_logging").status_code == 400


def test_the_interval_line(client: httpx.Client, workbench: Any) -> None:
    before = workbench.log.read_text().count("#queue-req: ")
    generate(client)
    lines = [line for line in workbench.log.read_text().splitlines() if "#queue-req: " in line]
    assert len(lines) - before in (3, 4)  # of 15 passes that decode, and of one that reads a prompt
    assert "INFO trunkline.engine: Decode batch, #running-req: 1, #token: " in lines[-1]
