"""Sessions on a live server: the answers are those of the joined prompts, which the cache holds."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

GREEDY = {"temperature": 0, "max_new_tokens": 6, "ignore_eos": True}


@pytest.fixture
def session(http: httpx.Client) -> Iterator[str]:
    name = http.post("/open_session", json={"capacity_of_str_len": 1000}).json()
    yield name
    http.post("/close_session", json={"session_id": name})


@pytest.fixture
def ask(http: httpx.Client, session: str) -> Callable[..., Any]:
    """``ask(ids, rid, parent, …)``: a request in the session; its record, with the prompt's ids."""

    def send(ids: list[int], rid: str, parent: str | None = None, **params: Any) -> Any:
        body = {
            "input_ids": ids,
            "rid": rid,
            "sampling_params": GREEDY,
            "session_params": {"id": session, "rid": parent, **params},
            "return_prompt_token_ids": True,
        }
        answer = http.post("/generate", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    return send


def alone(http: httpx.Client, ids: list[int]) -> list[int]:
    """What the model answers without a session, after a flush."""
    assert http.post("/flush_cache", params={"timeout": 20}).status_code == 200
    output: list[int] = http.post("/generate", json={"input_ids": ids, "sampling_params": GREEDY}).json()["output_ids"]
    return output


def test_appending_continues_prompt_and_output(http: httpx.Client, ask: Callable[..., Any]) -> None:
    first = list(range(100, 130))
    one = ask(first, "one")
    two = ask([7, 8], "two", "one")
    whole = [*first, *one["output_ids"], 7, 8]
    assert two["prompt_token_ids"] == whole
    assert two["meta_info"]["prompt_tokens"] == len(whole)
    assert two["meta_info"]["cached_tokens"] >= len(first) + len(one["output_ids"]) - 1
    three = ask([], "three", "two")
    assert three["prompt_token_ids"] == [*whole, *two["output_ids"]]
    assert ask([9], "root")["prompt_token_ids"] == [9], "without a rid it is a new root"
    assert two["output_ids"] == alone(http, whole)


def test_branches_share_a_parent(http: httpx.Client, ask: Callable[..., Any]) -> None:
    base = list(range(200, 220))
    output = ask(base, "base")["output_ids"]
    left, right = ask([5], "left", "base"), ask([6], "right", "base")
    assert left["prompt_token_ids"] == [*base, *output, 5]
    assert right["prompt_token_ids"] == [*base, *output, 6]
    dropped = ask([5], "dropped", "base", drop_previous_output=True)
    assert dropped["prompt_token_ids"] == [*base, 5]
    assert ask([5], "cut", "base", offset=3)["prompt_token_ids"] == [*base[:3], 5]
    assert right["output_ids"] == alone(http, right["prompt_token_ids"])


def refused(http: httpx.Client, session: str, **params: Any) -> str:
    body = {"input_ids": [5], "session_params": {"id": session, **params}, "sampling_params": GREEDY}
    answer = http.post("/generate", json=body)
    assert answer.status_code == 400, answer.text
    message: str = answer.json()["error"]["message"]
    return message


def test_replacing_forgets_what_followed(http: httpx.Client, session: str, ask: Callable[..., Any]) -> None:
    ask([5, 6], "a")
    ask([7], "b", "a")
    ask([8], "c", "b")
    output = ask([9], "d", "a", replace=True)["prompt_token_ids"]
    assert output[-1] == 9
    for gone in ("b", "c"):
        assert refused(http, session, rid=gone) == "Invalid request session id"
    ask([7], "e", "a")
    ask([5], "new", replace=True)
    assert refused(http, session, rid="a") == "Invalid request session id"


def test_a_running_request_is_not_appended_to_but_replaced(
    http: httpx.Client, server: Any, session: str, ask: Callable[..., Any]
) -> None:
    ended: list[Any] = []

    def run() -> None:
        params = {"temperature": 0, "max_new_tokens": 400, "ignore_eos": True}
        body = {"input_ids": [5, 6], "rid": "long", "sampling_params": params, "session_params": {"id": session}}
        ended.append(httpx.post(f"{server.url}/generate", json=body, timeout=120).json())

    thread = threading.Thread(target=run)
    thread.start()
    message = ""
    deadline = time.monotonic() + 60
    while message in ("", "Invalid request session id"):
        assert time.monotonic() < deadline
        message = refused(http, session, rid="long")
    assert message == "Session request is appending to a request that hasn't finished."
    record = ask([9], "next", "long", replace=True)
    thread.join()
    assert ended[0]["meta_info"]["finish_reason"]["type"] == "abort"
    seen = record["prompt_token_ids"]
    assert (seen[:2], seen[-1]) == ([5, 6], 9)
    assert seen[2:-1] == ended[0]["output_ids"][: len(seen) - 3]


def test_a_stream_continues_too(http: httpx.Client, session: str, ask: Callable[..., Any]) -> None:
    output = ask([5, 6], "a")["output_ids"]
    body = {
        "input_ids": [7],
        "rid": "b",
        "stream": True,
        "sampling_params": GREEDY,
        "session_params": {"id": session, "rid": "a"},
    }
    frames = http.post("/generate", json=body).text.split("\n\n")
    last = json.loads(frames[-3].removeprefix("data: "))
    assert last["meta_info"]["prompt_tokens"] == 3 + len(output)
    assert ask([8], "c", "b")["prompt_token_ids"] == [5, 6, *output, 7, *last["output_ids"], 8]
    bad = http.post("/generate", json=body | {"session_params": {"id": "nobody"}})
    assert "session id nobody does not exist" in bad.text
    assert bad.text.endswith("data: [DONE]\n\n")


def test_a_streaming_session_goes_on_from_its_last_request(http: httpx.Client) -> None:
    name = http.post("/open_session", json={"capacity_of_str_len": 1, "streaming": True}).json()
    seen: list[int] = []
    for ids in ([5, 6], [7], []):
        body = {"input_ids": ids, "session_params": {"id": name}, "sampling_params": GREEDY}
        record = http.post("/generate", json=body | {"return_prompt_token_ids": True}).json()
        seen += ids
        assert record["prompt_token_ids"] == seen
        seen += record["output_ids"]
    for params in ({"replace": True}, {"drop_previous_output": True}, {"offset": 1}):
        assert refused(http, name, **params) == f"Streaming sessions do not support {next(iter(params))}."


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_opening_and_closing(http: httpx.Client, method: str) -> None:
    body = {"capacity_of_str_len": 1, "session_id": f"mine-{method}"}
    opened = http.request(method, "/open_session", json=body)
    assert (opened.status_code, opened.json()) == (200, f"mine-{method}")
    again = http.request(method, "/open_session", json=body)
    assert again.status_code == 400
    message = "Failed to open the session. Check if a session with the same id is still open."
    assert again.json() == {"error": {"message": message}}
    for _ in range(2):
        closed = http.request(method, "/close_session", json={"session_id": f"mine-{method}"})
        assert (closed.status_code, closed.content) == (200, b"")
    gone = f"Invalid request: session id mine-{method} does not exist"
    assert refused(http, f"mine-{method}") == gone


def test_a_session_times_out(http: httpx.Client) -> None:
    name = http.post("/open_session", json={"capacity_of_str_len": 1, "timeout": 0.2}).json()
    body = {"input_ids": [5], "session_params": {"id": name}, "sampling_params": GREEDY}
    assert http.post("/generate", json=body).status_code == 200
    time.sleep(0.4)
    assert refused(http, name) == f"Invalid request: session id {name} does not exist"
    assert http.post("/open_session", json={"capacity_of_str_len": 1, "session_id": name}).status_code == 200
    http.post("/close_session", json={"session_id": name})
