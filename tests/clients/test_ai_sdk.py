"""Vercel's AI SDK, unmodified, with its providers for OpenAI and for compatible servers."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest

pytestmark = pytest.mark.clients

CLIENTS = ("ai", "@ai-sdk/openai", "@ai-sdk/openai-compatible")
SET = (
    "`baseURL`: the server's address with `/v1`; `apiKey`: any text, or that of `--api-key`; "
    "for several turns with the default model of `@ai-sdk/openai`: `providerOptions: { openai: { store: false } }`"
)

PACKAGES = ("ai@7.0.173", "@ai-sdk/openai@4.0.118", "@ai-sdk/openai-compatible@3.0.92", "zod@4.6.7")
QUESTION = [{"role": "user", "content": "Name a colour."}]
CHATS = ["responses", "chat", "compatible"]
COMPLETIONS = ["completion", "compatible-completion"]

Program = Callable[[str, str], Any]


@pytest.fixture(scope="module")
def program(javascript: Callable[..., Any], server: Any) -> Program:
    """A function from the names of a program in use_ai_sdk.mjs and of a provider to what it prints."""
    return lambda name, provider: javascript(PACKAGES, "use_ai_sdk.mjs", server.url, name, provider)


def check(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """An answer is the one of the native route."""
    assert found["text"] == expected["text"]
    assert found["finishReason"] == expected["meta_info"]["finish_reason"]["type"]
    assert found["usage"]["inputTokens"] == expected["meta_info"]["prompt_tokens"]
    assert found["usage"]["outputTokens"] == expected["meta_info"]["completion_tokens"]


@pytest.mark.parametrize("provider", CHATS)
def test_text(program: Program, generated: Callable[..., Any], provider: str) -> None:
    check(program("text", provider), generated(QUESTION))


@pytest.mark.parametrize("provider", CHATS)
def test_streamed_text(program: Program, generated: Callable[..., Any], provider: str) -> None:
    found = program("stream", provider)
    check(found, generated(QUESTION))
    assert "".join(found["pieces"]) == found["text"]
    assert len(found["pieces"]) > 1


@pytest.mark.parametrize("provider", COMPLETIONS)
@pytest.mark.parametrize("name", ["text", "stream"])
def test_completions(program: Program, generated: Callable[..., Any], name: str, provider: str) -> None:
    """The client writes the chat as text."""
    text = "user:\nName a colour.\n\nassistant:\n"
    check(program(name, provider), generated(text))


@pytest.mark.parametrize("provider", CHATS)
def test_objects(program: Program, provider: str) -> None:
    found = program("object", provider)
    colour = found["whole"]
    assert set(colour) == {"name", "shade", "parts"}
    assert colour["name"] in ("red", "green", "blue")
    assert colour["shade"] is None or len(colour["shade"]) <= 12
    assert len(colour["parts"]) == 3
    assert all(part in range(256) for part in colour["parts"])
    assert found["streamed"] == found["parts"][-1] == colour


@pytest.mark.parametrize("provider", CHATS)
def test_a_forced_tool(program: Program, provider: str) -> None:
    for calls in program("tool", provider):
        [call] = calls
        assert call["toolName"] == "get_weather"
        assert set(call["input"]) == {"city", "unit"}
        assert call["input"]["unit"] in ("celsius", "fahrenheit")
        assert not call.get("invalid")


@pytest.mark.parametrize("provider", CHATS)
def test_the_result_of_a_tool(program: Program, server: Any, provider: str) -> None:
    found = program("toolResult", provider)
    call = {"name": "get_weather", "arguments": json.dumps(found["input"])}
    turns = [
        {"role": "user", "content": "What is the weather in Rome?"},
        {"role": "assistant", "tool_calls": [{"id": "c", "type": "function", "function": call}]},
        {"role": "tool", "tool_call_id": "c", "content": '{"temperature":20}'},
    ]
    same = {"messages": turns, "temperature": 0, "max_tokens": 12}
    chat = httpx.post(f"{server.url}/v1/chat/completions", json=same, timeout=60).json()
    assert found["text"] == chat["choices"][0]["message"]["content"]


@pytest.mark.parametrize("provider", ["embedding", "compatible-embedding"])
def test_embeddings(
    javascript: Callable[..., Any], vector_server: Any, vectors_of: Callable[..., Any], provider: str
) -> None:
    found = javascript(PACKAGES, "use_ai_sdk.mjs", vector_server.url, "embed", provider)
    vectors = np.array(vectors_of(["A man is eating.", "The sea is calm."]))
    np.testing.assert_allclose(found["several"], vectors, atol=1e-5)
    np.testing.assert_allclose(found["single"], vectors[0], atol=1e-5)
    assert found["usage"]["tokens"] > 0
