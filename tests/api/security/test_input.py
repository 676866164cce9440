"""What clients send: R-6 (limits), R-8 (addresses), R-10 (shapes and numbers), R-14 (logs), on every route."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

SECRET = "xyzzy-plugh-42"
MAX_BODY = 1 << 20

FINE = {"text": "one", "input": "one", "inputs": "one", "query": "one", "documents": ["two"], "max_tokens": 1}
CHAT = {"messages": [{"role": "user", "content": "one"}]}
PAIR = {"text_1": "one", "text_2": "two", "texts": ["two"]}
WEIGHTS = {"model_path": "nowhere", "new_version": "x", "name": "x"}
MORE = {"prompt": "one", "tokens": [1], "ids": [1], "capacity_of_str_len": 1, "session_id": "x"}
DEEP = json.dumps(FINE | CHAT | PAIR | WEIGHTS | MORE)[:-1].encode() + b', "user": ' + b"[" * 64 + b"]" * 64 + b"}"
OTHERS = {  # fields of a deep body that are no text on these routes
    "/v1/embed": b'"inputs": "one", ', "/v2/embed": b'"inputs": "one", ', "/v1/responses": b'"text": "one", ',
}  # fmt: skip
BODIES = {
    "nothing": b"",
    "no JSON": b"{",
    "another type": b'"text"',
    "null": b"null",
    "not UTF-8": b'{"text": "\xff"}',
    "deep": DEEP,
    "very deep": b"[" * 500_000,
    "huge": b'{"text": "' + b"a" * MAX_BODY + b'"}',
    "lone surrogate": rb'{"text": "\ud800", "input": "\ud800", "query": "\ud800", "documents": ["\ud800"]}',
    "wrong types": b'{"text": {"a": 1}, "input": {"a": 1}, "query": [], "documents": 5, "messages": "x", "model": 7}',
    "negative ids": b'{"input_ids": [-1], "input": [-1], "inputs": [-1]}',
    "big ids": b'{"input_ids": [1000000000000], "input": [99999999], "inputs": [4294967296]}',
    "floats": b'{"input_ids": [1.5, 1e400], "input": [0.1], "inputs": [1e308]}',
}
# Any object is a body of these, with the defaults for what it lacks; what the server does then is undone below.
CONTROL = {
    "/abort_request", "/pause_generation", "/continue_generation", "/release_memory_occupation",
    "/resume_memory_occupation", "/update_weights_from_tensor", "/start_profile", "/configure_logging", "/slow_down",
}  # fmt: skip
NUMBERS = (-1, 0, 1 << 31, 1 << 63, 1 << 70, 1e308, -1e308, 0.5, True, "7", [], {})
FIELDS = (
    "n",
    "max_new_tokens",
    "top_k",
    "dimensions",
    "top_n",
    "max_tokens",
    "priority",
    "truncate",
    "temperature",
    "truncate_size",
)


@pytest.fixture(scope="module")
def posts(servers: Callable[..., Any], walls: list[str], outsiders: dict[str, str]) -> list[str]:
    """All routes that take a body from clients, those of plugins from outside included."""
    fortress = servers(*walls, environment=outsiders)
    paths = httpx.get(f"{fortress.url}/openapi.json").json()["paths"]
    found = [path for path, methods in paths.items() if "requestBody" in methods.get("post", {})]
    assert {"/generate", "/v1/chat/completions", "/encode", "/v1/rerank", "/classify", "/surprise"} <= set(found)
    assert set(found) >= CONTROL
    return [path for path in found if path not in CONTROL]


@pytest.mark.parametrize("kind", BODIES)
def test_no_body_is_the_servers_fault(http: httpx.Client, posts: list[str], kind: str) -> None:
    for path in posts:
        body = BODIES[kind].replace(OTHERS.get(path, b"\0"), b"")
        answer = http.post(path, content=body, headers={"content-type": "application/json"})
        assert 400 <= answer.status_code < 500, (path, answer.status_code, answer.text[:200])
        expected = {"deep": "at most 64", "huge": str(MAX_BODY)}.get(kind, "")
        assert expected in answer.text, (path, answer.text[:200])
    assert http.get("/health_generate").status_code == 200


@pytest.mark.parametrize("kind", BODIES)
def test_no_body_of_a_control_route_is_the_servers_fault(http: httpx.Client, posts: list[str], kind: str) -> None:
    for path in sorted(CONTROL):
        answer = http.post(path, content=BODIES[kind], headers={"content-type": "application/json"})
        assert answer.status_code < 500, (path, answer.status_code, answer.text[:200])
        for undo in ("/continue_generation", "/resume_memory_occupation", "/stop_profile"):
            http.post(undo, json={})
    assert http.get("/health_generate").status_code == 200


def test_no_number_is_the_servers_fault(http: httpx.Client, posts: list[str]) -> None:
    for path in posts:
        for field in FIELDS:
            for number in NUMBERS:
                sampling = {"sampling_params": {"max_new_tokens": 1, field: number}}
                answer = http.post(path, content=json.dumps(FINE | CHAT | PAIR | sampling | {field: number}))
                assert answer.status_code < 500, (path, field, number, answer.text[:200])
    assert http.get("/health_generate").status_code == 200


words = st.sampled_from(
    ["text", "input_ids", "input", "inputs", "query", "documents", "texts", "messages", "role", "content", "stream",
     "sampling_params", "n", "stop", "model", "text_1", "text_2", "rid", "encoding_format", "truncate"]
)  # fmt: skip
anything = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**65), 2**65) | st.floats() | st.text(max_size=6) | st.just("user"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=4),
    max_leaves=8,
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=st.dictionaries(words, anything, max_size=6), pick=st.integers(0, 1000))
def test_no_invention_is_the_servers_fault(
    http: httpx.Client, posts: list[str], body: dict[str, Any], pick: int
) -> None:
    body["sampling_params"] = {"max_new_tokens": 1}
    body["max_tokens"] = 1
    path = posts[pick % len(posts)]
    answer = http.post(path, content=json.dumps(body))
    assert answer.status_code < 500, (path, body, answer.text[:200])


@contextmanager
def listener() -> Iterator[tuple[str, list[Any]]]:
    """An address, and who called there."""
    callers: list[Any] = []
    with socket.create_server(("127.0.0.1", 0)) as sock:
        sock.settimeout(0.05)
        over = threading.Event()

        def accept() -> None:
            while not over.is_set():
                try:
                    connection, caller = sock.accept()
                except TimeoutError:
                    continue
                callers.append(caller)  # before the caller can see the end of its connection
                connection.close()

        thread = threading.Thread(target=accept)
        thread.start()
        try:
            yield f"http://127.0.0.1:{sock.getsockname()[1]}/x.png", callers
        finally:
            over.set()
            thread.join()


def test_no_address_in_a_request_is_visited(http: httpx.Client, posts: list[str]) -> None:
    with listener() as (url, callers):
        picture = [{"type": "image_url", "image_url": {"url": url}}]
        for path in posts:
            for body in (
                {"text": url, "input": url, "inputs": url, "query": url, "documents": [url], "image_data": url},
                {"messages": [{"role": "user", "content": picture}], "model": url},
            ):
                assert http.post(path, json=body | {"max_tokens": 1, "model_path": url}).status_code < 500
        assert callers == []
        with pytest.raises(httpx.TransportError):
            httpx.get(url, timeout=5)
        assert callers, "the listener must hear, or this test says nothing"


def test_logs_hold_no_words_of_clients(http: httpx.Client, fortress: Any, posts: list[str]) -> None:
    for path in posts:
        for body in (
            {"text": SECRET, "input": SECRET, "inputs": SECRET, "query": SECRET, "documents": [SECRET],
             "messages": [{"role": "user", "content": SECRET}], "max_tokens": 1},
            {"text": [[SECRET]], "input": {SECRET: 1}, "query": SECRET, "documents": [SECRET] * 3000},
        ):  # fmt: skip
            http.post(path, json=body)
    written = fortress.log.read_text()
    assert SECRET not in written
    assert re.search(r"rid=\S+ model=\S+ task=generation prompt=\d+", written)


async def test_a_crowd_of_bad_clients_stops_nobody(fortress: Any, posts: list[str]) -> None:
    async with httpx.AsyncClient(base_url=fortress.url, timeout=60) as http:
        good = [
            http.post("/generate", json={"input_ids": [[5, 6, 7]], "sampling_params": {"max_new_tokens": 8}})
            for _ in range(4)
        ]
        bad = [http.post(path, content=BODIES[kind]) for path in posts for kind in ("deep", "floats", "big ids")]
        answers = await asyncio.gather(*good, *bad)
    assert [answer.status_code for answer in answers[:4]] == [200] * 4
    assert all(400 <= answer.status_code < 500 for answer in answers[4:])
