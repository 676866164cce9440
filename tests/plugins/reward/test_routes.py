"""``/classify`` and ``/v1/classify`` with scores by arithmetic: shapes, truncation, refusals."""

from __future__ import annotations

from typing import Any

import httpx
import pytest


async def classify(client: httpx.AsyncClient, **body: Any) -> Any:
    answer = await client.post("/classify", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.mark.parametrize("method", ["POST", "PUT"])
async def test_a_single_text_is_one_object(client: httpx.AsyncClient, engine: Any, method: str) -> None:
    answer = await client.request(method, "/classify", json={"text": "hello", "rid": "mine", "online": True})
    assert answer.status_code == 200
    record = answer.json()
    total = sum(engine.items[0].prompt)
    assert record["embedding"] == [total, total + 1]
    meta = record["meta_info"]
    assert meta.pop("e2e_latency") >= 0
    assert meta == {
        "id": "mine",
        "finish_reason": {"type": "length", "length": 0},
        "prompt_tokens": len(engine.items[0].prompt),
        "weight_version": "default",
        "cached_tokens": len(engine.items[0].prompt) - 1,
    }


async def test_lists_keep_their_order(client: httpx.AsyncClient) -> None:
    records = await classify(client, input_ids=[[1, 2], [7], [3]], rid=["a", "b", "c"])
    assert [record["embedding"] for record in records] == [[3, 4], [7, 8], [3, 4]]
    assert [record["meta_info"]["id"] for record in records] == ["a", "b", "c"]
    assert len(await classify(client, text=["hello"])) == 1
    assert await classify(client, text=[]) == []
    assert (await classify(client, input_ids=[1, 2]))["embedding"] == [3, 4]


async def test_text_that_begins_with_bos_gets_another(client: httpx.AsyncClient, engine: Any, tokenizer: Any) -> None:
    """As transformers' tokenizers do by default, and SGLang: reward models were trained on it."""
    template = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
    assert template.startswith(tokenizer.bos_token)
    await classify(client, text=template)
    assert engine.items[0].prompt == tokenizer(template)["input_ids"]
    assert engine.items[0].prompt[:2] == [tokenizer.bos_token_id] * 2


async def test_pairs_are_joined(client: httpx.AsyncClient, engine: Any, tokenizer: Any) -> None:
    await classify(client, text=[["hello", "there"]])
    assert engine.items[0].prompt == tokenizer("hello", "there")["input_ids"]


@pytest.mark.parametrize("path", ["/classify", "/v1/classify"])
async def test_truncation_is_told(client: httpx.AsyncClient, engine: Any, path: str) -> None:
    ids = list(range(10, 50))
    body: dict[str, Any] = {"truncate": "START", "input_ids": [ids, [1]], "input": [ids, [1]]}
    answer = (await client.post(path, json=body)).json()
    cut, whole = answer["data"] if path == "/v1/classify" else [record["meta_info"] for record in answer]
    assert (cut["truncated"], cut["original_tokens"]) == (True, 40)
    assert "truncated" not in whole
    assert engine.items[0].prompt == ids[-32:]


async def test_salt_and_priority_reach_the_engine(client: httpx.AsyncClient, engine: Any) -> None:
    await classify(client, text="a", extra_key="tenant", priority=3)
    await client.post("/v1/classify", json={"input": "a", "cache_salt": "b", "priority": 2})
    assert [(item.salt, item.priority) for item in engine.items] == [(b"tenant", 3), (b"\xffb", 2)]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "At least one of text, input_ids, or image should be provided"),
        ({"text": "a", "input_ids": [1]}, "text and input_ids cannot be provided at the same time"),
        ({"text": ""}, "texts cannot be empty and tokenizer must be initialized"),
        ({"text": ["a", ""]}, "text[1]: texts cannot be empty and tokenizer must be initialized"),
        ({"text": [["a", "b", "c"]]}, "text[0]: a pair has two texts, this one has 3."),
        ({"input_ids": [1] * 33}, "The input (33 tokens) is longer than the model's context length (32 tokens)."),
        (
            {"input_ids": [[1], [1] * 33]},
            "input_ids[1]: The input (33 tokens) is longer than the model's context length (32 tokens).",
        ),
        ({"input_ids": [512]}, "The input_ids contains values greater than the vocab size (512): 512."),
        ({"text": ["a"] * 5}, "text has 5 items; at most 4 are allowed. Split it, or raise --max-batch-size."),
        ({"text": ["a", "b"], "rid": "x"}, "For a batch, rid must be a list with one id per input."),
        ({"text": "a", "image_data": ["x"]}, "image_data is not supported: this server takes text only. Leave it out."),
    ],
)
async def test_what_is_refused(client: httpx.AsyncClient, engine: Any, body: dict[str, Any], message: str) -> None:
    answer = await client.post("/classify", json=body)
    assert (answer.status_code, answer.json()) == (400, {"error": {"message": message}})
    assert not engine.items


@pytest.mark.parametrize("body", [{"text": 5}, {"text": "a", "truncate": "middle"}, {"text": "a", "rid": "x" * 300}])
async def test_wrong_types_are_a_400(client: httpx.AsyncClient, engine: Any, body: dict[str, Any]) -> None:
    answer = await client.post("/classify", json=body)
    assert (answer.status_code, answer.json()["type"]) == (400, "Bad Request")
    assert not engine.items


async def test_labels_and_probabilities(client: httpx.AsyncClient, engine: Any) -> None:
    answer = (await client.post("/v1/classify", json={"input": ["hello", "there"], "model": "any"})).json()
    assert answer["id"].startswith("classify-")
    assert (answer["object"], answer["model"]) == ("list", "fake")
    assert answer["created"] > 0
    for index, entry in enumerate(answer["data"]):
        assert (entry["index"], entry["label"], entry["num_classes"]) == (index, "good", 2)
        assert entry["probs"] == pytest.approx([1 / (1 + 2.718281828), 2.718281828 / (1 + 2.718281828)], rel=1e-3)
    tokens = sum(len(item.prompt) for item in engine.items)
    assert answer["usage"] == {
        "prompt_tokens": tokens,
        "total_tokens": tokens,
        "completion_tokens": 0,
        "prompt_tokens_details": {"cached_tokens": tokens - 2},
    }


@pytest.mark.parametrize("name", ["use_activation", "activation"])
async def test_scores_without_activation(client: httpx.AsyncClient, name: str) -> None:
    answer = await client.post("/v1/classify", json={"input": [7], name: False})
    assert answer.json()["data"][0]["probs"] == [7, 8]


async def test_one_label(client: httpx.AsyncClient, config: dict[str, Any]) -> None:
    config["id2label"] = {"0": "LABEL_0"}
    [entry] = (await client.post("/v1/classify", json={"input": [[1], [0]][:1]})).json()["data"]
    assert entry == {"index": 0, "label": "LABEL_0", "probs": [pytest.approx(0.731058, abs=1e-5)], "num_classes": 1}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "input cannot be empty."),
        ([[1], [513]], "input[1]: The input contains values greater than the vocab size (512): 513."),
        ([[1], [1] * 33], "input[1]: The input (33 tokens) is longer"),
        (["a", ""], "input[1]: texts cannot be empty"),
        ([[1], []], "input[1]: a list of ids cannot be empty."),
        (["a"] * 5, "input has 5 items; at most 4 are allowed."),
        (["a", 1], "input mixes texts and token ids."),
        ("", "input cannot be empty."),
    ],
)
async def test_openai_dialect_of_errors(client: httpx.AsyncClient, engine: Any, given: Any, message: str) -> None:
    answer = await client.post("/v1/classify", json={"input": given})
    assert (answer.status_code, answer.json()["type"]) == (400, "BadRequestError")
    assert answer.json()["message"].startswith(message)
    assert answer.json()["param"] == ("input[1]" if message.startswith("input[1]") else "input")
    assert not engine.items


@pytest.mark.field
async def test_the_request_s_id_and_keys_of_the_cache_are_used(client: httpx.AsyncClient, engine: Any) -> None:
    body = {"input": ["a", "b"], "rid": ["x", "y"], "extra_key": "k", "cache_salt": "s"}
    assert (await client.post("/v1/classify", json=body)).status_code == 200
    assert [(item.rid, item.salt) for item in engine.items] == [("x", b"k\xffs"), ("y", b"k\xffs")]
