"""OpenAI's client for JavaScript, unmodified, gets the texts and vectors of the native routes."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest

pytestmark = pytest.mark.clients

CLIENTS = ("openai (npm)",)
SET = "`baseURL`: the server's address with `/v1`; `apiKey`: any text, or that of `--api-key`"

PACKAGES = ("openai@7.59.0", "zod@4.6.7")
QUESTION = [{"role": "user", "content": "Name a colour."}]
ROME = {"role": "user", "content": "What is the weather in Rome?"}
TEXTS = ["A man is eating.", "The sea is calm."]


@pytest.fixture(scope="module")
def program(javascript: Callable[..., Any], server: Any) -> Callable[[str], Any]:
    """A function from the name of a program in use_openai.mjs to what it prints."""
    return lambda name: javascript(PACKAGES, "use_openai.mjs", server.url, name)


def check_colour(found: dict[str, Any]) -> None:
    assert set(found) == {"name", "shade", "parts"}
    assert found["name"] in ("red", "green", "blue")
    assert found["shade"] is None or len(found["shade"]) <= 12
    assert len(found["parts"]) == 3
    assert all(part in range(256) for part in found["parts"])


def check_weather(arguments: dict[str, Any]) -> None:
    assert set(arguments) == {"city", "unit"}
    assert len(arguments["city"]) <= 16
    assert arguments["unit"] in ("celsius", "fahrenheit")


def check_usage(usage: dict[str, Any], meta: dict[str, Any]) -> None:
    """The usage of a chat is that of the native route."""
    assert usage["prompt_tokens"] == meta["prompt_tokens"]
    assert usage["completion_tokens"] == meta["completion_tokens"]
    assert usage["total_tokens"] == meta["prompt_tokens"] + meta["completion_tokens"]


def test_chat(program: Callable[[str], Any], generated: Callable[..., Any]) -> None:
    answer, expected = program("chat"), generated(QUESTION)
    assert answer["choices"][0]["message"]["content"] == expected["text"]
    assert answer["choices"][0]["finish_reason"] == expected["meta_info"]["finish_reason"]["type"]
    check_usage(answer["usage"], expected["meta_info"])


def test_streamed_chat(program: Callable[[str], Any], generated: Callable[..., Any]) -> None:
    chunks, expected = program("chatStream"), generated(QUESTION)
    texts = [choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"]]
    assert "".join(texts) == expected["text"]
    assert sum(map(bool, texts)) > 1
    check_usage(chunks[-1]["usage"], expected["meta_info"])


def test_the_streaming_helper(program: Callable[[str], Any], generated: Callable[..., Any]) -> None:
    found, expected = program("chatHelper"), generated(QUESTION)
    assert "".join(found["deltas"]) == found["content"] == expected["text"]
    assert found["completion"]["choices"][0]["finish_reason"] == "length"


def test_parsed_objects(program: Callable[[str], Any]) -> None:
    whole, streamed = program("parsed")
    check_colour(whole)
    assert streamed == whole


def test_a_forced_tool(program: Callable[[str], Any]) -> None:
    for choice in program("tool"):
        assert choice["finish_reason"] == "tool_calls"
        [call] = choice["message"]["tool_calls"]
        assert call["function"]["name"] == "get_weather"
        check_weather(call["function"]["parsed_arguments"])


def test_tools_that_the_client_runs(program: Callable[[str], Any]) -> None:
    found = program("runTools")
    [arguments] = found["called"]
    check_weather(arguments)
    call, result = found["messages"][-2:]
    assert json.loads(call["tool_calls"][0]["function"]["arguments"]) == arguments
    assert result["tool_call_id"] == call["tool_calls"][0]["id"]
    assert json.loads(result["content"]) == {"temperature": 20}


def test_the_result_of_a_tool(program: Callable[[str], Any], generated: Callable[..., Any]) -> None:
    call = '\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>'
    result = '<tool_response>\n{"temperature": 20}\n</tool_response>'
    turns = [ROME, {"role": "assistant", "content": call}, {"role": "user", "content": result}]
    answer, expected = program("toolResult"), generated(turns)
    assert answer["choices"][0]["message"]["content"] == expected["text"]
    check_usage(answer["usage"], expected["meta_info"])


def test_a_response(program: Callable[[str], Any], generated: Callable[..., Any]) -> None:
    answer, expected = program("response"), generated(QUESTION)
    assert answer["output_text"] == expected["text"]
    assert answer["status"] == "incomplete"
    assert answer["incomplete_details"]["reason"] == "max_output_tokens"
    assert answer["usage"]["input_tokens"] == expected["meta_info"]["prompt_tokens"]
    assert answer["usage"]["output_tokens"] == expected["meta_info"]["completion_tokens"]


def test_a_streamed_response(program: Callable[[str], Any], generated: Callable[..., Any]) -> None:
    found, expected = program("responseStream"), generated(QUESTION)
    events = found["events"]
    deltas = [event["delta"] for event in events if event["type"] == "response.output_text.delta"]
    assert "".join(deltas) == expected["text"]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert events[-1]["response"]["usage"]["output_tokens"] == expected["meta_info"]["completion_tokens"]
    assert found["final"]["output_text"] == expected["text"]


def test_responses_as_objects(program: Callable[[str], Any]) -> None:
    whole, streamed = program("responseParsed")
    check_colour(whole)
    assert streamed == whole


def test_functions_of_responses(program: Callable[[str], Any], server: Any) -> None:
    found = program("responseTool")
    for call in found["calls"]:
        assert (call["type"], call["name"]) == ("function_call", "get_weather")
        check_weather(call["parsed_arguments"])
    call = {
        "id": "c",
        "type": "function",
        "function": {"name": "get_weather", "arguments": found["calls"][0]["arguments"]},
    }
    turns = [
        ROME,
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": '{"temperature": 20}'},
    ]
    same = {"messages": turns, "temperature": 0, "max_tokens": 12}
    chat = httpx.post(f"{server.url}/v1/chat/completions", json=same, timeout=60).json()
    assert found["text"] == chat["choices"][0]["message"]["content"]


def test_completions(program: Callable[[str], Any], generated: Callable[..., Any]) -> None:
    found, expected = program("completion"), generated("The capital of France is")
    assert found["whole"]["choices"][0]["text"] == expected["text"]
    assert "".join(chunk["choices"][0]["text"] for chunk in found["chunks"]) == expected["text"]
    check_usage(found["whole"]["usage"], expected["meta_info"])


def test_embeddings(javascript: Callable[..., Any], vector_server: Any, vectors_of: Callable[..., Any]) -> None:
    answers = javascript(PACKAGES, "use_openai.mjs", vector_server.url, "embeddings")
    for answer in answers:  # without encoding_format the client asks for base64, which it decodes
        found = [one["embedding"] for one in answer["data"]]
        np.testing.assert_allclose(found, vectors_of(TEXTS), atol=1e-5)
        assert answer["usage"]["prompt_tokens"] == answers[0]["usage"]["prompt_tokens"] > 0


def test_models(program: Callable[[str], Any], server: Any) -> None:
    listed, one = program("models")
    assert listed == one
    assert listed["id"] == httpx.get(f"{server.url}/v1/models").json()["data"][0]["id"]


def test_refusals_say_why(program: Callable[[str], Any]) -> None:
    found = program("refused")
    assert (found["class"], found["status"]) == ("BadRequestError", 400)
    assert "temperature" in found["message"]
