"""``/v1/chat/completions`` with a scripted engine: raw shapes, and the real ``openai`` SDK on a real port."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.plugins.generation.openai.requests import chat, chunks_of
from trunkline.core.errors import QueueFull, RequestError
from trunkline.plugins.generation.openai.defaults import chat_defaults


async def events(client: httpx.AsyncClient, **body: Any) -> list[dict[str, Any]]:
    return chunks_of(await chat(client, stream=True, **body))


async def test_a_reply(client: httpx.AsyncClient, engine: Any, byte_level: Any) -> None:
    engine.says(" fox", {"type": "stop", "matched": "x"})
    answer = (await chat(client, stop="x")).json()
    (item,) = engine.items
    prompt = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert byte_level.decode(item.prompt, skip_special_tokens=False) == prompt
    assert answer["id"].startswith("chatcmpl-")
    assert (answer["object"], answer["model"]) == ("chat.completion", "any")
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": " fo"}
    assert (choice["finish_reason"], choice["matched_stop"]) == ("stop", "x")
    done = len(engine.replies[0].tokens)
    assert answer["usage"] == {
        "prompt_tokens": len(item.prompt),
        "completion_tokens": done,
        "total_tokens": len(item.prompt) + done,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert answer["metadata"] == {"weight_version": "default"}


async def test_the_reply_names_all_weights_that_generated_it(
    client: httpx.AsyncClient, engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.says(" the quick fox", {"type": "length", "length": 9})
    play = engine._play

    async def update(reply: Any) -> None:
        await play(reply)
        reply.versions, reply.weight_version = [("old", 1)], "new"

    monkeypatch.setattr(engine, "_play", update)
    metadata = (await chat(client)).json()["metadata"]
    assert metadata["weight_version"] == "new"
    assert [span["version"] for span in metadata["weight_versions"]] == ["old", "new"]


async def test_parts_of_text_are_joined(client: httpx.AsyncClient, engine: Any, byte_level: Any) -> None:
    parts = [{"type": "text", "text": "hello "}, {"type": "text", "text": "fox"}]
    await chat(client, messages=[{"role": "user", "content": parts}, {"role": "assistant", "content": None}])
    assert "user\nhello fox<|im_end|>" in byte_level.decode(engine.items[0].prompt)


async def test_sampling_reaches_the_engine(client: httpx.AsyncClient, engine: Any) -> None:
    await chat(client)
    assert engine.items[-1].params.temperature == 0.7
    await chat(client, max_tokens=3, max_completion_tokens=4, seed=9, temperature=1.5, top_p=0.5, stop="x", top_k=7)
    params = engine.items[-1].params
    assert (params.max_new_tokens, params.seed, params.temperature, params.top_p) == (4, 9, 1.5, 0.5)
    assert (params.stop, params.top_k) == (("x",), 7)


async def test_preferred_parameters(engine: Any, make_app: Callable[..., Any]) -> None:
    app = make_app(engine, preferred_sampling_params='{"temperature": 0, "max_new_tokens": 5}')
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        await chat(client)
        await chat(client, max_tokens=7)
    assert [item.params.temperature for item in engine.items] == [0.0, 0.0]
    assert [item.params.max_new_tokens for item in engine.items] == [5, 7]


async def test_n_counts_the_prompt_once(client: httpx.AsyncClient, engine: Any) -> None:
    engine.script = lambda item: [5, {"type": "length", "length": 1}]
    answer = (await chat(client, n=2, rid="mine")).json()
    assert answer["id"] == "mine"
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    assert answer["usage"]["prompt_tokens"] == len(engine.items[0].prompt)
    assert answer["usage"]["completion_tokens"] == 2


async def test_stream_sends_deltas(client: httpx.AsyncClient, engine: Any) -> None:
    engine.says("naïve 🙂 fox")
    chunks = await events(client, stream_options={"include_usage": True})
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks[:-1]]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta.get("content", "") for delta in deltas) == "naïve 🙂 fox"
    assert chunks[-2]["choices"][0]["finish_reason"] == "length"
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == len(engine.replies[0].tokens)
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert all("usage" not in chunk for chunk in await events(client))


async def test_stream_with_n(client: httpx.AsyncClient, engine: Any) -> None:
    engine.says("fox")
    chunks = await events(client, n=2)
    for index in range(2):
        mine = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert "".join(choice["delta"].get("content", "") for choice in mine) == "fox"
        assert [choice["finish_reason"] for choice in mine if choice["finish_reason"]] == ["length"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"messages": []}, "Messages cannot be empty."),
        ({"messages": [{"content": "x"}]}, "messages[0].role must be a non-empty string."),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content must be a string or a list"),
        ({"messages": [{"role": "user"}]}, "messages[0].content must be a string or a list"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0]: only text parts are supported, got 'image_url'.",
        ),
        (
            {"messages": [{"role": "refused", "content": "x"}]},
            "The model's chat template refused the messages: no such",
        ),
        ({"tools": [{"type": "function"}]}, "Missing required parameter: 'tools[0].function'."),
        ({"logprobs": True, "top_logprobs": 51}, "top_logprobs must be in [0, 50], got 51."),
        ({"logprobs": True, "top_logprobs": -1}, "top_logprobs must be in [0, 50], got -1."),
        ({"top_logprobs": 1}, "top_logprobs needs logprobs; set it to true."),
        ({"session_id": "x"}, "session_id is not supported yet"),
        ({"custom_logit_processor": "x"}, "The server is not configured to enable custom logit processor."),
        ({"response_format": {"type": "json_schema"}}, "Missing required parameter: 'response_format.json_schema'."),
        ({"frequency_penalty": 3}, "frequency_penalty must be in [-2, 2], got 3.0."),
        ({"logit_bias": {"x": 1}}, "invalid literal for int() with base 10: 'x'"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens must be in [0, max_tokens(4)], got 5."),
        ({"stop_regex": "("}, "stop_regex '(' can't be used: missing ): ("),
        ({"custom_params": {"x": "y" * 70000}}, "custom_params may have at most 65536 bytes"),
        ({"temperature": -1}, "temperature must be a non-negative finite number, got -1.0."),
        ({"n": 65}, "n must be at most 64, got 65"),
        ({"max_tokens": 0}, "max_tokens must be at least 1, or -1 for no limit; got 0."),
        ({"max_tokens": 100}, "max_tokens is too large: 100. This model's maximum context length is 100"),
        ({"messages": [{"role": "user", "content": "a b c d" * 50}]}, "The input ("),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_refused(
    client: httpx.AsyncClient, engine: Any, body: dict[str, Any], message: str, stream: bool
) -> None:
    response = await chat(client, **body, stream=stream)
    assert response.status_code == 400
    answer = response.json()
    assert answer["message"].startswith(message)
    assert (answer["object"], answer["type"], answer["code"]) == ("error", "BadRequestError", 400)
    assert engine.items == []


async def test_neutral_values_pass(client: httpx.AsyncClient) -> None:
    body = {
        "tools": None,
        "tool_choice": "none",
        "logprobs": False,
        "top_logprobs": 0,
        "response_format": {"type": "text"},
        "frequency_penalty": 0,
        "presence_penalty": 0.0,
        "logit_bias": {},
        "modalities": ["text"],
        "user": "me",
        "store": False,
    }
    assert (await chat(client, **body)).status_code == 200


async def test_missing_messages_are_a_400(client: httpx.AsyncClient) -> None:
    assert (await client.post("/v1/chat/completions", json={"model": "x"})).status_code == 400


async def test_without_chat_template(
    client: httpx.AsyncClient, byte_level: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(byte_level, "chat_template", None)
    response = await chat(client)
    assert response.status_code == 400
    assert "no chat template" in response.json()["message"]


def test_defaults_come_from_generation_config(tmp_path: Path) -> None:
    recommended = {"temperature": 0.2, "top_p": 0.9, "top_k": 0, "repetition_penalty": 1.05, "eos_token_id": 2}
    assert chat_defaults(str(tmp_path), "model") == {"temperature": 0.7}
    (tmp_path / "generation_config.json").write_text(json.dumps(recommended))
    assert chat_defaults(str(tmp_path), "model") == {"temperature": 0.2, "top_p": 0.9, "repetition_penalty": 1.05}
    assert chat_defaults(str(tmp_path), "openai") == {"temperature": 0.7}
    (tmp_path / "generation_config.json").write_text("{")
    assert chat_defaults(str(tmp_path), "model") == {"temperature": 0.7}


# -- the real SDK ----------------------------------------------------------------------------


async def test_sdk_reply(sdk: openai.AsyncOpenAI, engine: Any) -> None:
    engine.says("fox", {"type": "stop", "matched": 3})
    answer = await sdk.chat.completions.create(model="any", messages=[{"role": "user", "content": "hi"}])
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == len(engine.replies[0].tokens)


async def test_sdk_stream(sdk: openai.AsyncOpenAI, engine: Any) -> None:
    engine.says("naïve 🙂 fox")
    stream = await sdk.chat.completions.create(
        model="any",
        messages=[{"role": "user", "content": "hi"}],
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == "naïve 🙂 fox"
    assert chunks[-1].usage is not None


async def test_sdk_errors(sdk: openai.AsyncOpenAI, engine: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="temperature must be"):
        await sdk.chat.completions.create(model="any", messages=[{"role": "user", "content": "hi"}], temperature=-1)
    engine.refuse = QueueFull()
    with pytest.raises(openai.InternalServerError) as full:
        await sdk.chat.completions.create(model="any", messages=[{"role": "user", "content": "hi"}])
    assert full.value.status_code == 503
    engine.refuse = RequestError("no such model", code="model_not_found")
    with pytest.raises(openai.NotFoundError):
        await sdk.chat.completions.create(model="any", messages=[{"role": "user", "content": "hi"}])


async def test_sdk_error_in_mid_stream(sdk: openai.AsyncOpenAI, engine: Any) -> None:
    engine.script = lambda item: [50, RequestError("the engine stopped", status=503)]
    stream = await sdk.chat.completions.create(model="any", messages=[{"role": "user", "content": "hi"}], stream=True)
    with pytest.raises(openai.APIError, match="the engine stopped"):
        _ = [chunk async for chunk in stream]


async def test_the_sequences_of_a_client_that_disconnects_are_aborted(sdk: openai.AsyncOpenAI, engine: Any) -> None:
    engine.script = lambda item: [50] * 1_000_000
    stream = await sdk.chat.completions.create(
        model="any", messages=[{"role": "user", "content": "hi"}], stream=True, n=2
    )
    async for chunk in stream:
        if chunk.choices[0].delta.content:
            break
    await stream.close()
    while not all(reply.cancelled for reply in engine.replies[1:]):
        await asyncio.sleep(0.01)
