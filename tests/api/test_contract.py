"""The contract against a live server: real model, real engine process, real port."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

GREEDY = {"temperature": 0, "max_new_tokens": 6, "ignore_eos": True}


def tokens_in_use(http: httpx.Client) -> int:
    info = http.get("/get_server_info").json()
    return int(info["max_total_num_tokens"] - info["internal_states"][0]["free_tokens"])


def test_get_model_info_has_the_five_keys(http: httpx.Client, checkpoint: Path) -> None:
    assert http.get("/get_model_info").json() == {
        "model_path": str(checkpoint),
        "is_generation": True,
        "tokenizer_path": str(checkpoint),
        "preferred_sampling_params": None,
        "weight_version": "default",
    }


def test_the_longest_input_is_the_one_that_server_info_names(http: httpx.Client) -> None:
    limit = http.get("/get_server_info").json()["max_req_input_len"]
    body = {"sampling_params": {"max_new_tokens": 1, "ignore_eos": True}}
    assert http.post("/generate", json=body | {"input_ids": [5] * (limit - 1)}).status_code == 200
    refused = http.post("/generate", json=body | {"input_ids": [5] * limit}).json()["error"]["message"]
    assert f"exceeds the maximum allowed length ({limit} tokens)" in refused


def test_server_info_has_the_device_in_use(http: httpx.Client) -> None:
    info = http.get("/get_server_info").json()
    assert (info["device"], info["internal_states"][0]["device"]) == ("cpu", "cpu")  # the setting is "auto"


@pytest.mark.field
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", {"text": "a b " * 1_000_000}),
        ("/generate", {"text": ["a", " " * 4_000_000]}),
        ("/v1/completions", {"prompt": ["a", "a" * 4_000_000]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a" * 4_000_000}]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a" * 100_000}] * 40}),
    ],
)
def test_a_text_of_very_many_characters_is_refused_unread(http: httpx.Client, path: str, body: Any) -> None:
    answer = http.post(path, json=body)
    assert answer.status_code == 400
    assert "The input (4000" in answer.text  # 000, and the roles of messages
    assert " characters) is longer than the model's context length (512 tokens)" in answer.text
    assert "at most 139264 characters are accepted" in answer.text


def test_health_probes_do_not_touch_the_cache(http: httpx.Client) -> None:
    http.post("/flush_cache")
    for _ in range(3):
        assert http.get("/health_generate").status_code == 200
    answer = http.post("/generate", json={"input_ids": list(range(5, 40)), "sampling_params": GREEDY}).json()
    assert answer["meta_info"]["cached_tokens"] == 0


def test_prompt_and_output_but_the_last_token_are_cached_until_flushed(http: httpx.Client) -> None:
    assert http.post("/flush_cache").text.startswith("Cache flushed.")
    ids = list(range(5, 105))

    def cached(prompt: list[int]) -> int:
        answer = http.post("/generate", json={"input_ids": prompt, "sampling_params": GREEDY})
        return int(answer.json()["meta_info"]["cached_tokens"])

    assert [cached(ids), cached(ids), cached(ids[:50])] == [0, 99, 49]
    assert cached(ids + list(range(200, 220))) == 100
    assert http.get("/flush_cache").status_code == 200
    assert cached(ids) == 0


def test_streaming_equals_whole(http: httpx.Client) -> None:
    body: dict[str, Any] = {"text": "hello there", "sampling_params": GREEDY | {"max_new_tokens": 20}}
    whole = http.post("/generate", json=body).json()
    frames = http.post("/generate", json=body | {"stream": True}).text.split("\n\n")
    assert frames[-2] == "data: [DONE]"
    last = json.loads(frames[-3].removeprefix("data: "))
    assert (last["text"], last["output_ids"]) == (whole["text"], whole["output_ids"])


def test_logprobs_whole_and_streamed(http: httpx.Client) -> None:
    """SGLang's layout: entries of three, the first of the prompt without value, top lists beside them."""
    http.post("/flush_cache")
    body: dict[str, Any] = {
        "input_ids": list(range(5, 25)),
        "return_logprob": True,
        "logprob_start_len": 15,
        "top_logprobs_num": 2,
        "token_ids_logprob": [9, 7],
        "return_text_in_logprobs": True,
        "sampling_params": GREEDY,
    }
    whole = http.post("/generate", json=body).json()
    meta = whole["meta_info"]
    assert [entry[1] for entry in meta["input_token_logprobs"]] == list(range(20, 25))
    assert meta["input_token_logprobs"][0][0] is None
    assert meta["input_top_logprobs"][0] is meta["input_token_ids_logprobs"][0] is None
    assert [entry[1] for entry in meta["output_token_logprobs"]] == whole["output_ids"]
    assert meta["output_token_logprobs"] == [top[0] for top in meta["output_top_logprobs"]]
    assert {tuple(entry[1] for entry in entries) for entries in meta["output_token_ids_logprobs"]} == {(9, 7)}
    assert all(isinstance(text, str) and value <= 0 for value, _, text in meta["output_token_logprobs"])
    frames = http.post("/generate", json=body | {"stream": True}).text.split("\n\n")
    last = json.loads(frames[-3].removeprefix("data: "))["meta_info"]
    assert last["cached_tokens"] == 15
    for name in ("input_token_logprobs", "output_token_logprobs"):
        assert [entry[1:] for entry in last[name]] == [entry[1:] for entry in meta[name]]
        values = [[entry[0] or 0.0 for entry in one[name]] for one in (last, meta)]
        assert values[0] == pytest.approx(values[1], abs=1e-3)
    scored = http.post("/generate", json=body | {"sampling_params": GREEDY | {"max_new_tokens": 0}}).json()
    assert (scored["text"], scored["output_ids"], len(scored["meta_info"]["output_token_logprobs"])) == ("", [], 1)
    plain = http.post("/generate", json={"input_ids": [5, 6], "return_logprob": True, "sampling_params": GREEDY})
    assert plain.json()["meta_info"]["input_token_logprobs"] == []


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"",
        b"{}",
        b'{"text": 5}',
        b'{"input_ids": []}',
        b'{"input_ids": [999999]}',
        b'{"text": "a", "sampling_params": {"temperatur": 1}}',
        b'{"text": "a", "sampling_params": {"temperature": "hot"}}',
        b'{"text": "a", "sampling_params": {"n": 1000000}}',
        b'{"text": "a", "sampling_params": {"max_new_tokens": 100000}}',
        b'{"text": "a", "return_logprob": true, "logprob_start_len": 99}',
        b'{"text": "a", "return_hidden_states": true}',
        b'{"text": "a", "return_routed_experts": true}',
        b'{"input_ids": [' + b"5," * 2000 + b"5]}",
        b"[" * 100_000,
    ],
)
def test_bad_requests_are_400_and_harm_nothing(http: httpx.Client, body: bytes) -> None:
    answer = http.post("/generate", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400, answer.text
    error = answer.json()
    assert error.get("message") or error["error"]["message"]
    good = http.post("/generate", json={"input_ids": [5, 6], "sampling_params": GREEDY})
    assert len(good.json()["output_ids"]) == 6


@pytest.mark.parametrize("stream", [False, True])
def test_hanging_up_frees_the_slots(http: httpx.Client, server: Any, stream: bool) -> None:
    params = {"max_new_tokens": 440, "ignore_eos": True}
    rid = f"gone-{stream}"
    content = json.dumps({"input_ids": list(range(5, 60)), "rid": rid, "stream": stream, "sampling_params": params})
    head = "POST /generate HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    head += f"content-length: {len(content)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as sock:
        sock.sendall((head + content).encode())
        if stream:
            assert sock.recv(1)  # it has begun
        else:
            time.sleep(0.05)
    deadline = time.monotonic() + 30
    while http.post("/flush_cache").status_code != 200 or tokens_in_use(http):  # a beat brings the count
        assert time.monotonic() < deadline
        time.sleep(0.1)
    (line,) = [line for line in server.log.read_text().splitlines() if f"rid={rid} " in line]
    assert "finish=abort" in line  # it did not just run to its end


def test_abort_ends_a_stream_with_a_record(http: httpx.Client) -> None:
    params = {"max_new_tokens": 400, "ignore_eos": True}
    last = {}
    with http.stream(
        "POST", "/generate", json={"text": "a", "rid": "to-end", "stream": True, "sampling_params": params}
    ) as answer:
        assert answer.headers["x-request-id"] == "to-end"
        for number, line in enumerate(line for line in answer.iter_lines() if line.startswith("data: {")):
            last = json.loads(line.removeprefix("data: "))
            if number == 0:
                http.post("/abort_request", json={"rid": "to-end"})
    assert last["meta_info"]["finish_reason"]["type"] == "abort"


def test_openapi_describes_the_bodies(http: httpx.Client) -> None:
    schema = http.get("/openapi.json").json()
    assert {"/generate", "/v1/chat/completions", "/health"} <= set(schema["paths"])
    assert "requestBody" in schema["paths"]["/generate"]["put"]
    assert "sampling_params" in schema["components"]["schemas"]["GenerateBody"]["properties"]
