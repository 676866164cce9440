"""Pauses over HTTP, on a live server: answers, health, time limits, SIGTERM, and an engine that dies meanwhile."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

PAUSED = {"message": "Generation paused successfully.", "status": "ok"}
CONTINUED = {"message": "Generation continued successfully.", "status": "ok"}
SAMPLING = {"max_new_tokens": 400, "temperature": 0, "ignore_eos": True}
BODY: dict[str, Any] = {"input_ids": list(range(5, 45)), "sampling_params": SAMPLING}
SHORT: dict[str, Any] = {"input_ids": [9, 8, 7], "sampling_params": SAMPLING | {"max_new_tokens": 8}}


class Callers:
    """Requests that are sent from threads, so that a test can go on while they hang."""

    def __init__(self, url: str, pool: ThreadPoolExecutor) -> None:
        self.url = url
        self.pool = pool

    def post(self, body: dict[str, Any], path: str = "/generate") -> Future[httpx.Response]:
        return self.pool.submit(lambda: httpx.post(f"{self.url}{path}", json=body, timeout=120))

    def stream(self) -> tuple[list[dict[str, Any]], Future[None]]:
        """The frames of a long reply so far, once there are a few, and its end."""
        frames: list[dict[str, Any]] = []
        begun = threading.Event()

        def read() -> None:
            with httpx.stream("POST", f"{self.url}/generate", json=BODY | {"stream": True}, timeout=120) as answer:
                for line in answer.iter_lines():
                    if line.startswith("data: {"):
                        frames.append(json.loads(line.removeprefix("data: ")))
                        if len(frames) > 2:
                            begun.set()

        future = self.pool.submit(read)
        assert begun.wait(60)
        return frames, future


@pytest.fixture
def callers() -> Iterator[Callable[[Any], Callers]]:
    with ThreadPoolExecutor(16) as pool:
        yield lambda server: Callers(server.url, pool)


def pause(server: Any, body: Any = None, path: str = "/pause_generation") -> Any:
    answer = httpx.post(f"{server.url}{path}", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()


def go_on(server: Any) -> None:
    answer = httpx.post(f"{server.url}/continue_generation", timeout=60)  # no body, as SGLang 0.5.3 is called
    assert (answer.status_code, answer.json()) == (200, CONTINUED)


@pytest.mark.parametrize("mode", ["retract", "in_place"])
def test_a_stream_stands_still_and_goes_on(server: Any, callers: Callable[[Any], Callers], mode: str) -> None:
    whole = httpx.post(f"{server.url}/generate", json=BODY, timeout=120).json()
    frames, ended = callers(server).stream()
    assert pause(server, {"mode": mode}) == PAUSED
    time.sleep(0.3)
    count = len(frames[-1]["output_ids"])
    hanging = callers(server).post(SHORT)
    time.sleep(0.3)
    assert len(frames[-1]["output_ids"]) == count < 400
    assert not hanging.done()
    assert httpx.get(f"{server.url}/health").status_code == 200
    began = time.monotonic()
    assert httpx.get(f"{server.url}/health_generate", timeout=30).status_code == 200
    assert time.monotonic() - began < 15
    go_on(server)
    ended.result(120)
    assert frames[-1]["output_ids"] == whole["output_ids"]
    assert frames[-1]["text"] == whole["text"]
    assert "weight_versions" not in frames[-1]["meta_info"]
    assert hanging.result(60).status_code == 200


@pytest.mark.parametrize("body", [None, {}, {"mode": None}, {"mode": "abort"}, {"mode": "abort", "unknown": 1}])
def test_by_default_running_requests_end_and_new_ones_hang(
    server: Any, callers: Callable[[Any], Callers], body: Any
) -> None:
    frames, ended = callers(server).stream()
    assert pause(server, body) == PAUSED
    ended.result(60)
    assert frames[-1]["meta_info"]["finish_reason"] == {
        "type": "abort", "message": "Aborted", "status_code": None, "err_type": None
    }  # fmt: skip
    assert frames[-1]["output_ids"]
    hanging = callers(server).post(SHORT | {"rid": "hangs"})
    time.sleep(0.3)
    assert not hanging.done()
    httpx.post(f"{server.url}/abort_request", json={"rid": "hang"})
    answer = hanging.result(60)
    assert answer.status_code == 200
    assert answer.json()["meta_info"]["finish_reason"]["message"] == "Abort in waiting queue"
    assert answer.json()["meta_info"]["prompt_tokens"] == 3
    assert httpx.post(f"{server.url}/flush_cache").status_code == 200
    go_on(server)
    assert httpx.post(f"{server.url}/generate", json=SHORT, timeout=60).status_code == 200


@pytest.mark.parametrize("body", [{"mode": "gently"}, {"mode": 3}, [], "abort"])
def test_what_is_no_mode_is_a_400(server: Any, body: Any) -> None:
    answer = httpx.post(f"{server.url}/pause_generation", json=body)
    assert (answer.status_code, answer.json()["type"]) == (400, "Bad Request")
    assert httpx.post(f"{server.url}/pause_generation", content=b"{").status_code == 400
    assert httpx.get(f"{server.url}/pause_generation").status_code == 405
    assert httpx.post(f"{server.url}/generate", json=SHORT, timeout=60).status_code == 200


def test_a_batch_with_samples_is_aborted_whole(server: Any, callers: Callable[[Any], Callers]) -> None:
    """While the prompts of n > 1 are computed, too: samples that weren't submitted yet don't run afterwards."""
    pause(server)
    batch = {"input_ids": [BODY["input_ids"], SHORT["input_ids"]], "sampling_params": SAMPLING | {"n": 3}}
    hanging = callers(server).post(batch)
    time.sleep(0.3)
    httpx.post(f"{server.url}/abort_request", json={"abort_all": True})
    answer = hanging.result(60).json()
    assert [one["meta_info"]["finish_reason"]["type"] for one in answer] == ["abort"] * 6
    assert [one["output_ids"] for one in answer] == [[]] * 6
    go_on(server)
    state = httpx.get(f"{server.url}/get_server_info").json()["internal_states"][0]
    assert state["num_running_reqs"] == 0


@pytest.mark.parametrize("mode", ["retract", "in_place"])
def test_weights_are_updated_in_a_pause_and_replies_name_both(
    workbench: Any, checkpoint: Path, callers: Callable[[Any], Callers], other: Callable[[str], Path], mode: str
) -> None:
    server = workbench
    frames, ended = callers(server).stream()
    pause(server, {"mode": mode})
    hanging = callers(server).post(SHORT)
    time.sleep(0.3)
    count = len(frames[-1]["output_ids"])
    order = {"model_path": str(other("llama")), "weight_version": "two"}
    updated = httpx.post(f"{server.url}/update_weights_from_disk", json=order, timeout=120).json()
    assert (updated["success"], updated["num_paused_requests"]) == (True, 2)
    go_on(server)
    ended.result(120)
    meta = frames[-1]["meta_info"]
    assert meta["weight_version"] == "two"
    assert meta["weight_versions"] == [
        {"version": "default", "start": 0, "end": count},
        {"version": "two", "start": count, "end": 400},
    ]
    later = hanging.result(60).json()["meta_info"]
    assert later["weight_version"] == "two"
    assert "weight_versions" not in later
    order = {"model_path": str(checkpoint), "weight_version": "default"}
    assert httpx.post(f"{server.url}/update_weights_from_disk", json=order, timeout=120).json()["success"]


def test_limits_of_time_and_a_restart_of_the_engine(
    launch: Callable[..., Any], callers: Callable[[Any], Callers]
) -> None:
    server = launch("--queue-timeout", "1", "--watchdog-timeout", "1")
    server.wait()
    engine = server.engine()
    _, ended = callers(server).stream()
    pause(server, {"mode": "in_place"})
    late = callers(server).post(SHORT)
    assert late.result(60).status_code == 503  # it waited for too long, as in any queue
    time.sleep(1)
    assert server.engine().pid == engine.pid, "the watchdog took the pause for a hang"
    assert not ended.done()
    assert httpx.get(f"{server.url}/health").status_code == 200
    engine.kill()
    engine.wait(60)
    ended.result(60)  # with an error frame
    deadline = time.monotonic() + 120
    while httpx.get(f"{server.url}/health").status_code != 200:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert callers(server).post(SHORT).result(60).status_code == 503  # the new engine is paused, too
    go_on(server)
    assert callers(server).post(SHORT).result(60).status_code == 200


@pytest.mark.parametrize("mode", ["retract", "in_place"])
def test_sigterm_in_a_pause_lets_requests_end(
    launch: Callable[..., Any], callers: Callable[[Any], Callers], mode: str
) -> None:
    server = launch()
    server.wait()
    frames, ended = callers(server).stream()
    pause(server, {"mode": mode})
    hanging = callers(server).post(SHORT)
    time.sleep(0.3)
    began = time.monotonic()
    assert server.terminate() == 0
    assert time.monotonic() - began < 25, "it waited for --drain-timeout"
    ended.result(10)
    assert len(frames[-1]["output_ids"]) == 400
    assert hanging.result(10).status_code == 200
