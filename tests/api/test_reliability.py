"""kill -9, kill -STOP and SIGTERM under load."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import httpx

BODY: dict[str, Any] = {"input_ids": [5, 6, 7], "sampling_params": {"max_new_tokens": 300, "ignore_eos": True}}


def load(url: str, count: int) -> Callable[[], list[int]]:
    """Send ``count`` requests at once; the result waits for their statuses."""
    statuses: list[int] = []
    threads = [
        threading.Thread(
            target=lambda: statuses.append(httpx.post(f"{url}/generate", json=BODY, timeout=300).status_code)
        )
        for _ in range(count)
    ]
    for thread in threads:
        thread.start()

    def join() -> list[int]:
        for thread in threads:
            thread.join()
        return statuses

    return join


def running(server: Any) -> bool:
    state = httpx.get(f"{server.url}/server_info").json()["internal_states"][0]
    return bool(state["num_running_reqs"])


def wait_until(condition: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_killed_engine_is_replaced_and_sigterm_drains(launch: Callable[..., Any]) -> None:
    server = launch()
    server.wait()
    statuses = load(server.url, 16)
    wait_until(lambda: running(server))
    server.engine().kill()
    assert set(statuses()) <= {200, 503}
    assert 503 in statuses()
    wait_until(lambda: httpx.get(f"{server.url}/health").status_code == 200)
    assert httpx.post(f"{server.url}/generate", json=BODY, timeout=120).status_code == 200
    statuses = load(server.url, 16)
    wait_until(lambda: running(server))
    time.sleep(0.5)  # the last of them has been accepted
    assert server.terminate() == 0
    assert set(statuses()) == {200}


def test_a_stopped_engine_makes_health_fail_until_it_goes_on(launch: Callable[..., Any]) -> None:
    server = launch()
    server.wait()
    engine = server.engine()
    engine.suspend()
    wait_until(lambda: httpx.get(f"{server.url}/health").status_code == 503, 20)
    engine.resume()
    wait_until(lambda: httpx.get(f"{server.url}/health").status_code == 200)
    assert server.engine().pid == engine.pid
    assert httpx.post(f"{server.url}/generate", json=BODY, timeout=120).status_code == 200
