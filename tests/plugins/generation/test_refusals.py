"""All errors of ``/generate``; invalid requests don't reach the engine."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from trunkline.core.errors import QueueFull, RequestError


async def generate(client: httpx.AsyncClient, **body: Any) -> httpx.Response:
    return await client.post("/generate", json=body)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "Either text, input_ids or input_embeds should be provided."),
        ({"input_ids": []}, "input_ids cannot be empty."),
        ({"input_ids": [1, [2]]}, "input_ids mixes ids and lists of ids."),
        ({"input_ids": [[1], 2]}, "input_ids mixes ids and lists of ids."),
        ({"input_ids": [100000]}, "The input_ids contains values greater than the vocab size ("),
        ({"input_ids": [-1]}, "The input_ids contains a negative value: -1."),
        ({"text": ""}, "texts cannot be empty and tokenizer must be initialized"),
        ({"input_ids": [1] * 100}, "The input (100 tokens) is longer than the model's context length (100 tokens)."),
        ({"input_ids": [1] * 95}, "Input length (95 tokens) exceeds the maximum allowed length (94 tokens)."),
        (
            {"input_ids": [1] * 50, "sampling_params": {"max_new_tokens": 51}},
            "Requested token count exceeds the model's maximum context length of 100 tokens. You requested a total "
            "of 101 tokens: 50 tokens from the input messages and 51 tokens for the completion.",
        ),
        (
            {"text": ["a"] * 65, "sampling_params": [{"stop_regex": str(index)} for index in range(65)]},
            "sampling_params has more than 64 different values of stop_regex; split the batch.",
        ),
        ({"text": "a", "sampling_params": {"temperatur": 0}}, "unknown field `temperatur`, expected one of"),
        ({"text": "a", "sampling_params": {"logit_bias": {"-1": 1}}}, "logit_bias must has keys in [0, 321], got -1."),
        ({"text": "a", "sampling_params": {"stop_regex": "(?=x)"}}, "stop_regex '(?=x)' can't be used: invalid perl"),
        ({"text": "a", "sampling_params": {"n": 65}}, "n must be at most 64, got 65; --max-n sets the limit."),
        ({"text": ["a"] * 6, "sampling_params": {"n": 3}}, "The request asks for 18 sequences (6 prompts, n = 3)"),
        ({"text": ["a"] * 17}, "The request asks for 17 sequences"),
        ({"text": "a", "sampling_params": [{}]}, "sampling_params must be an object for a single prompt."),
        ({"text": ["a", "b"], "sampling_params": [{}]}, "sampling_params has 1 entries for a batch of 2"),
        (
            {"text": ["a", "b"], "sampling_params": [{"n": 1}, {"n": 2}]},
            "The parallel_sample_num should be the same for all samples in sample params.",
        ),
        ({"text": ["a", "b"], "rid": ["x"]}, "The specified rids length mismatch with the batch_size"),
        ({"text": ["a", "b"], "rid": ["x", "x"]}, "Duplicate request IDs detected within the request: ['x']"),
        (
            {"text": "a", "custom_logit_processor": "x"},
            "The server is not configured to enable custom logit processor.",
        ),
        ({"text": "a", "return_flat_raw_top_logprobs": True}, "return_flat_raw_top_logprobs is not supported yet"),
        (
            {"text": "a", "lora_path": "x"},
            "LoRA adapter 'x' was requested, but LoRA is not enabled. This server has no",
        ),
        ({"text": ["a", "b"], "lora_path": [None, "y"]}, "LoRA adapter 'y' was requested, but LoRA is not enabled."),
        ({"text": "a", "extra_key": ["x"]}, "extra_key should be a string for a single request."),
        ({"text": ["a"], "extra_key": ["x", "y"]}, "The length of extra_key should be equal to the batch size."),
        ({"text": ["a"], "extra_key": [None]}, "Every extra_key should be a string."),
        ({"text": "a", "cache_salt": ["x"]}, "cache_salt should be a string for a single request."),
        ({"text": ["a"], "cache_salt": []}, "The length of cache_salt should be equal to the batch size."),
        ({"text": ["a", "b"], "cache_salt": ["x", None]}, "Every cache_salt should be a string."),
        (
            {"text": "a", "image_data": json.loads("[" * 60 + "]" * 60)},
            "image_data is not supported: this server takes text only.",
        ),
        ({"text": "a", "max_thinking_tokens": 5}, "max_thinking_tokens is not supported yet"),
        ({"text": "a", "image_data": "x"}, "image_data is not supported: this server takes text only."),
    ],
)
async def test_refused(client: httpx.AsyncClient, engine: Any, body: dict[str, Any], message: str) -> None:
    response = await client.post("/generate", json=body)
    assert response.status_code == 400
    assert list(response.json()) == ["error"]
    assert response.json()["error"]["message"].startswith(message)
    assert engine.items == []


@pytest.mark.field
@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"input_ids": [[1], []]}, "input_ids[1]: a list of ids cannot be empty."),
        ({"input_ids": [[1], [100000]]}, "input_ids[1]: The input_ids contains values greater than the vocab size ("),
        ({"input_ids": [[1], [-1]]}, "input_ids[1]: The input_ids contains a negative value: -1."),
        ({"input_ids": [[1] * 100]}, "input_ids[0]: The input (100 tokens) is longer than"),
        ({"input_ids": [[1], [1] * 95]}, "input_ids[1]: Input length (95 tokens) exceeds"),
        ({"text": ["a", ""]}, "text[1]: texts cannot be empty"),
        ({"text": ["a", "fox " * 100]}, "text[1]: The input ("),
        ({"text": ["a", "b", "a" * 140_000]}, "text[2]: The input (140000 characters) is longer than"),
        (
            {"input_ids": [[1], [1] * 50], "sampling_params": {"max_new_tokens": 51}},
            "input_ids[1]: Requested token count exceeds the model's maximum context length",
        ),
        (
            {"text": ["a", "b"], "sampling_params": [{"max_new_tokens": 9}, {"max_new_tokens": 100}]},
            "text[1]: Requested token count exceeds",
        ),
        ({"text": ["a", "b"], "sampling_params": [{}, {"top_p": 2}]}, "sampling_params[1]: top_p must be in (0, 1]"),
        ({"text": ["a", "b"], "sampling_params": [{"temperatur": 0}, {}]}, "sampling_params[0]: unknown field"),
        ({"text": ["a", "b"], "sampling_params": [{}, {"n": 65}]}, "sampling_params[1]: n must be at most 64"),
        ({"text": ["a", "b"], "sampling_params": [{}, {"regex": 1}]}, "sampling_params[1]: regex must be a string"),
    ],
)
async def test_an_error_names_the_item_of_a_batch(
    client: httpx.AsyncClient, engine: Any, body: dict[str, Any], message: str
) -> None:
    response = await client.post("/generate", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["message"].startswith(message)
    assert engine.items == []


@pytest.mark.field
@pytest.mark.parametrize("body", [{"text": "a" * 140_000}, {"text": ""}, {"input_ids": [1] * 100}])
async def test_an_error_of_a_single_prompt_names_no_item(client: httpx.AsyncClient, body: dict[str, Any]) -> None:
    assert "[" not in (await client.post("/generate", json=body)).json()["error"]["message"]


@pytest.mark.field
async def test_a_refused_field_is_a_400_in_a_stream_too(client: httpx.AsyncClient) -> None:
    response = await generate(client, text="a", stream=True, return_sampling_mask=True)
    assert (response.status_code, response.headers["content-type"]) == (400, "application/json")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'{"text": 5}',
        b'{"input_ids": ["a"]}',
        b'{"input_ids": [1.5]}',
        b'{"text": "a", "sampling_params": 3}',
        b'{"text": "a", "stream": "maybe"}',
        b'{"input_ids": [99999999999999999999999]}',
        b'{"text": "\xff"}',
        b'{"text": "\\ud800"}',
        b'{"sampling_params": ' + b"[" * 100_000,
    ],
)
async def test_bodies_that_cannot_be_decoded(client: httpx.AsyncClient, engine: Any, body: bytes) -> None:
    response = await client.post("/generate", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert (response.json()["object"], response.json()["code"]) == ("error", 400)
    assert engine.items == []


async def test_neutral_values_of_clients_are_accepted(client: httpx.AsyncClient) -> None:
    extras = dict.fromkeys(("lora_path", "image_data", "custom_logit_processor", "session_params", "input_embeds"))
    body = {"text": "a", "stream": False, "return_logprob": False, "logprob_start_len": -1, "top_logprobs_num": 0}
    assert (await client.post("/generate", json={**body, **extras, "return_hidden_states": False})).status_code == 200
    lists = {"lora_path": [None, None], "custom_logit_processor": [None], "return_logprob": [False, False]}
    assert (await client.post("/generate", json={"text": ["a", "b"], **lists})).status_code == 200
    assert (await client.post("/generate", json={"text": "a", "lora_path": ""})).status_code == 200


async def test_a_full_queue_is_503_at_once_streaming_or_not(client: httpx.AsyncClient, engine: Any) -> None:
    engine.refuse = QueueFull()
    for stream in (False, True):
        response = await generate(client, text="a", stream=stream)
        assert response.status_code == 503
        assert response.headers["retry-after"] == "1"
        assert response.json()["message"] == "The request queue is full."


async def test_an_engine_failure_fails_the_batch_and_aborts_the_other_sequences(
    client: httpx.AsyncClient, engine: Any
) -> None:
    def script(item: Any) -> list[Any]:
        return [RequestError("down", status=503)] if item.rid == "x_0" else [5] * 10_000

    engine.script = script
    response = await generate(client, text=["a", "b"], rid="x")
    assert response.status_code == 503
    assert response.json()["message"] == "down"
    assert engine.replies[1].cancelled


async def test_logits_that_are_not_finite_are_a_500(client: httpx.AsyncClient, engine: Any) -> None:
    engine.script = lambda item: [{"type": "abort", "message": "nan", "status_code": 500, "err_type": None}]
    failed = await generate(client, text="a")
    assert (failed.status_code, failed.json()["message"]) == (500, "nan")


async def test_the_error_of_a_sequence_names_its_prompt(client: httpx.AsyncClient, engine: Any) -> None:
    nan = {"type": "abort", "message": "nan", "status_code": 500, "err_type": None}
    last = engine.tokenizer("").encode("b", add_special_tokens=False)
    engine.script = lambda item: [nan if item.prompt == last else {"type": "length", "length": 0}]
    failed = await generate(client, text=["a", "b"], sampling_params={"n": 2})
    assert (failed.status_code, failed.json()["message"]) == (500, "text[1]: nan")
