"""``/abort_request`` in every form, on a live server."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx
import pytest

SAMPLING = {"max_new_tokens": 450, "temperature": 0, "ignore_eos": True}
ABORTED = {"type": "abort", "message": "Aborted", "status_code": None, "err_type": None}
WAITING = ABORTED | {"message": "Abort in waiting queue"}


@pytest.fixture
def slow(workbench: Any) -> Iterator[Any]:
    """Two requests at a time, and one pass takes a moment."""
    httpx.post(f"{workbench.url}/slow_down", json={"forward_sleep_time": 0.01})
    yield workbench
    httpx.post(f"{workbench.url}/slow_down", json={"forward_sleep_time": None})


@pytest.fixture
def send(slow: Any) -> Iterator[Callable[..., Future[httpx.Response]]]:
    with ThreadPoolExecutor(16) as pool:

        def post(path: str = "/generate", **body: Any) -> Future[httpx.Response]:
            return pool.submit(lambda: httpx.post(f"{slow.url}{path}", json=body, timeout=120))

        yield post


@pytest.fixture
def abort(slow: Any) -> Callable[..., None]:
    def post(**body: Any) -> None:
        answer = httpx.post(f"{slow.url}/abort_request", json=body)
        assert (answer.status_code, answer.content) == (200, b"")

    return post


def state(server: Any) -> dict[str, Any]:
    found: dict[str, Any] = httpx.get(f"{server.url}/get_server_info").json()["internal_states"][0]
    return found


def wait_for(server: Any, **counts: int) -> None:
    deadline = time.monotonic() + 60
    while any(state(server)[name] != count for name, count in counts.items()):
        assert time.monotonic() < deadline, state(server)
        time.sleep(0.05)


def test_a_prefix_means_all_that_begin_with_it(slow: Any, send: Any, abort: Any) -> None:
    batch = send(input_ids=[[5, 6, 7], [8, 9, 10], [11, 12]], sampling_params=SAMPLING, rid="x")
    wait_for(slow, num_running_reqs=2, num_waiting_reqs=1)
    other = send(input_ids=[13, 14], sampling_params=SAMPLING, rid="yx_0")
    wait_for(slow, num_running_reqs=2, num_waiting_reqs=2)
    for body in ({}, {"rid": ""}, {"rid": None}, {"rid": "nobody"}, {"abort_all": None}, {"rid": "", "abort_all": 0}):
        abort(**body)
    assert not batch.done()
    abort(rid="x_2", unknown=1)  # one of the batch, which waits
    time.sleep(0.2)
    assert not batch.done()
    abort(rid="x")
    metas = [one["meta_info"] for one in batch.result(60).json()]
    assert [meta["finish_reason"] for meta in metas] == [ABORTED, ABORTED, WAITING]
    assert [meta["id"] for meta in metas] == ["x_0", "x_1", "x_2"]
    assert all(meta["completion_tokens"] > 0 for meta in metas[:2])
    assert (metas[2]["completion_tokens"], metas[2]["prompt_tokens"]) == (0, 2)
    assert not other.done()
    abort(rid="yx_0")
    assert other.result(60).json()["meta_info"]["finish_reason"]["type"] == "abort"
    wait_for(slow, num_running_reqs=0, num_waiting_reqs=0, free_tokens=state(slow)["memory_usage"]["token_capacity"])


def test_all_of_every_task(slow: Any, send: Any, abort: Any) -> None:
    running = [send(input_ids=[5 + n, 6], sampling_params=SAMPLING) for n in range(2)]
    wait_for(slow, num_running_reqs=2)
    waiting = [send(input_ids=[7, 8], sampling_params=SAMPLING), send("/encode", input_ids=[5, 6, 7])]
    samples = send(input_ids=[9, 10, 11], sampling_params=SAMPLING | {"n": 2})
    wait_for(slow, num_waiting_reqs=3)
    abort(rid="nobody", abort_all=True)
    for future in running:
        assert future.result(60).json()["meta_info"]["finish_reason"] == ABORTED
    assert waiting[0].result(60).json()["meta_info"]["finish_reason"] == WAITING
    assert waiting[1].result(60).status_code == 499
    assert [one["meta_info"]["finish_reason"] for one in samples.result(60).json()] == [WAITING] * 2
    wait_for(slow, num_running_reqs=0, num_waiting_reqs=0)


def test_a_stream_ends_with_a_record(slow: Any, send: Any, abort: Any) -> None:
    lines: list[str] = []
    begun = threading.Event()

    def read() -> None:
        body = {"input_ids": [5, 6], "sampling_params": SAMPLING, "stream": True, "rid": "streamed"}
        with httpx.stream("POST", f"{slow.url}/generate", json=body, timeout=60) as answer:
            for line in answer.iter_lines():
                lines.append(line)
                begun.set()

    thread = threading.Thread(target=read)
    thread.start()
    assert begun.wait(60)
    abort(rid="streamed")
    thread.join(60)
    data = [line for line in lines if line]
    assert data[-1] == "data: [DONE]"
    assert '"type":"abort"' in data[-2]


def test_what_is_no_order(slow: Any) -> None:
    url = f"{slow.url}/abort_request"
    assert httpx.post(url).status_code == 400
    for body in ([], {"rid": 5}, {"rid": ["x"]}, {"abort_all": "perhaps"}, {"rid": "x" * 1025}):
        assert httpx.post(url, json=body).status_code == 400
    assert httpx.get(url).status_code == 405
