"""kill -9, kill -STOP and SIGTERM under load."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import psutil

BODY: dict[str, Any] = {"input_ids": [5, 6, 7], "sampling_params": {"max_new_tokens": 300, "ignore_eos": True}}


# The engine's numbers are a second old: two at a time make 16 requests outlast that on any machine.
SLOWLY = ("--max-running-requests", "2")


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
    server = launch(*SLOWLY)
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


def test_a_stopped_engine_makes_health_fail_until_it_goes_on(workbench: Any) -> None:
    server = workbench
    engine = server.engine()
    statuses = load(server.url, 16)
    wait_until(lambda: running(server))
    engine.suspend()
    wait_until(lambda: httpx.get(f"{server.url}/health").status_code == 503, 20)
    engine.resume()
    wait_until(lambda: httpx.get(f"{server.url}/health").status_code == 200)
    assert server.engine().pid == engine.pid
    assert statuses() == [200] * 16  # they waited, and none was lost
    assert httpx.post(f"{server.url}/generate", json=BODY, timeout=120).status_code == 200


def test_a_hundred_clients_that_never_read_cost_nobody_anything(server: Any) -> None:
    """Their streams are computed and kept as one state each; neighbours are served meanwhile."""
    short = {"input_ids": [9, 8, 7], "sampling_params": {"max_new_tokens": 8, "temperature": 0}}
    expected = httpx.post(f"{server.url}/generate", json=short, timeout=120).json()["output_ids"]
    engine, front = server.engine(), psutil.Process(server.process.pid)
    before = front.memory_info().rss, engine.memory_info().rss
    body = json.dumps({**BODY, "stream": True}).encode()
    head = (
        f"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    with contextlib.ExitStack() as stack:
        for _ in range(100):
            client = stack.enter_context(socket.socket())
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(("127.0.0.1", server.port))
            client.sendall(head.encode() + body)
        wait_until(lambda: running(server))
        for _ in range(5):
            answer = httpx.post(f"{server.url}/generate", json=short, timeout=120)
            assert answer.json()["output_ids"] == expected
        wait_until(lambda: not running(server))
        after = front.memory_info().rss, engine.memory_info().rss
        # 100 unread streams of 300 cumulative frames would be 100 MB and more.
        assert after[0] - before[0] < 50 << 20
        assert after[1] - before[1] < 50 << 20
    wait_until(lambda: httpx.post(f"{server.url}/flush_cache").status_code == 200)
