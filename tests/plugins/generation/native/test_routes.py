"""``/generate`` over HTTP with a scripted engine: shapes and streams."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import httpx
import msgspec
import pytest

from trunkline.core.errors import RequestError

ABORTED = {"type": "abort", "message": "Aborted", "status_code": None, "err_type": None}


async def generate(client: httpx.AsyncClient, **body: Any) -> httpx.Response:
    return await client.post("/generate", json=body)


async def frames(client: httpx.AsyncClient, **body: Any) -> list[dict[str, Any]]:
    """The events of a stream, whose last one must be [DONE]."""
    response = await generate(client, stream=True, **body)
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    events = response.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]


# -- whole answers ---------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["POST", "PUT"])
async def test_a_single_prompt(client: httpx.AsyncClient, engine: Any, method: str) -> None:
    engine.says(" fox")
    response = await client.request(method, "/generate", json={"text": "hello", "rid": "mine", "online": True})
    assert response.status_code == 200
    record = response.json()
    prompt = engine.items[0].prompt
    assert record["text"] == " fox"
    assert record["output_ids"] == engine.replies[0].tokens
    meta = record["meta_info"]
    assert meta.pop("e2e_latency") >= 0
    assert meta == {
        "id": "mine",
        "finish_reason": {"type": "length", "length": len(record["output_ids"])},
        "prompt_tokens": len(prompt),
        "weight_version": "default",
        "completion_tokens": len(record["output_ids"]),
        "cached_tokens": 0,
    }


async def test_a_batch_keeps_its_order(client: httpx.AsyncClient, engine: Any) -> None:
    engine.script = lambda item: [*item.prompt, {"type": "length", "length": 1}]
    records = (await generate(client, text=["hello", "fox"], rid="x")).json()
    assert [record["text"] for record in records] == ["hello", "fox"]
    assert [record["meta_info"]["id"] for record in records] == ["x_0", "x_1"]
    assert isinstance((await generate(client, text=["hello"])).json(), list)
    assert (await generate(client, text=[])).json() == []


async def test_ids_win_over_text(client: httpx.AsyncClient, engine: Any) -> None:
    assert (await generate(client, text=["a", "b"], input_ids=[1, 2])).json()["meta_info"]["prompt_tokens"] == 2
    assert len((await generate(client, input_ids=[[1, 2], [3]])).json()) == 2


async def test_samples_are_prompt_major_with_own_ids_and_share_a_prefill(
    client: httpx.AsyncClient, engine: Any
) -> None:
    engine.script = lambda item: [item.prompt[0], {"type": "length", "length": 1}]
    body = {"input_ids": [[1, 2], [3, 4]], "sampling_params": {"n": 2, "sampling_seed": 5}, "rid": ["a", "b"]}
    records = (await client.post("/generate", json=body)).json()
    assert [record["output_ids"] for record in records] == [[1], [1], [3], [3]]
    ids = {record["meta_info"]["id"] for record in records}
    assert len(ids) == 4
    assert not ids & {"a", "b"}
    primes, samples = engine.items[:2], engine.items[2:]
    assert [item.params.max_new_tokens for item in primes] == [0, 0]
    assert [item.params.seed for item in samples] == [5, 6, 5, 6]


async def test_sampling_params_per_prompt(client: httpx.AsyncClient, engine: Any) -> None:
    await generate(client, text=["a", "b"], sampling_params=[{"max_new_tokens": 1}, {"max_new_tokens": 2}])
    assert [item.params.max_new_tokens for item in engine.items] == [1, 2]


async def test_default_seeds_differ(client: httpx.AsyncClient, engine: Any) -> None:
    await generate(client, text=["a", "a"])
    assert engine.items[0].params.seed != engine.items[1].params.seed


async def test_new_tokens_are_cut_to_the_context(client: httpx.AsyncClient, engine: Any) -> None:
    await generate(client, input_ids=[1] * 10, sampling_params={"max_new_tokens": None})
    await generate(client, input_ids=[1] * 10)
    assert [item.params.max_new_tokens for item in engine.items] == [88, 88]


async def test_salt_and_priority_reach_the_engine(client: httpx.AsyncClient, engine: Any) -> None:
    await generate(client, text="a", extra_key="tenant", priority=3)
    assert (engine.items[0].salt, engine.items[0].priority) == (b"tenant", 3)


async def test_cache_salts_and_extra_keys_are_never_equal(client: httpx.AsyncClient, engine: Any) -> None:
    given: list[dict[str, str]] = [
        {},
        {"extra_key": "a"},
        {"cache_salt": "a"},
        {"extra_key": "a", "cache_salt": "a"},
        {"extra_key": "aa"},
        {"cache_salt": "aa"},
    ]
    for keys in given:
        await generate(client, text="a", **keys)
    assert len({item.salt for item in engine.items}) == len(given)


async def test_each_prompt_of_a_batch_may_have_a_salt(client: httpx.AsyncClient, engine: Any) -> None:
    body = {"input_ids": [[1, 2], [3, 4]], "extra_key": ["x", ""], "cache_salt": "s", "sampling_params": {"n": 2}}
    assert (await client.post("/generate", json=body)).status_code == 200
    first, second = b"x\xffs", b"\xffs"
    assert [item.salt for item in engine.items] == [first, second, first, first, second, second], "primes, then samples"


async def test_prompt_token_ids_on_request(client: httpx.AsyncClient, engine: Any, byte_level: Any) -> None:
    ids = byte_level.encode("hello")
    body: dict[str, Any] = {"text": "hello", "return_prompt_token_ids": True}
    assert (await generate(client, **body)).json()["prompt_token_ids"] == ids
    assert "prompt_token_ids" not in (await generate(client, text="hello")).json()
    assert [frame["prompt_token_ids"] for frame in await frames(client, **body)] == [ids]
    records = (await generate(client, **body | {"text": ["hello", "fox"], "sampling_params": {"n": 2}})).json()
    assert [record["prompt_token_ids"] for record in records] == [ids] * 2 + [byte_level.encode("fox")] * 2


@pytest.mark.parametrize("field", ["rid", "extra_key", "cache_salt"])
async def test_ids_and_salts_have_a_maximum_length(client: httpx.AsyncClient, engine: Any, field: str) -> None:
    answer = await client.post("/generate", json={"text": ["a"] * 8, field: "x" * 5000})
    assert (answer.status_code, answer.json()["type"]) == (400, "Bad Request")
    assert field in answer.json()["message"]
    assert not engine.items


@pytest.mark.parametrize("trim", [True, False])
async def test_stop_strings_are_cut_from_the_text(client: httpx.AsyncClient, engine: Any, trim: bool) -> None:
    engine.says("the fox jumps", {"type": "stop", "matched": "fox"})
    params = {"stop": "fox", "no_stop_trim": not trim}
    record = (await generate(client, text="a", sampling_params=params)).json()
    assert record["text"] == ("the " if trim else "the fox jumps")
    assert record["meta_info"]["finish_reason"] == {"type": "stop", "matched": "fox"}


@pytest.mark.parametrize("matched", ["fo.", "the", "max_sentences"])
async def test_the_match_of_an_expression_or_a_condition_stays_in_the_text(
    client: httpx.AsyncClient, engine: Any, matched: str
) -> None:
    """As in SGLang. If the text contains the pattern itself, nothing that was sent is withdrawn."""
    engine.says("the fo. jumps over the fox", {"type": "stop", "matched": matched})
    params = {"stop_regex": ["fo.", "the"], "stop": "dog"}
    record = (await generate(client, text="a", sampling_params=params)).json()
    assert record["text"] == "the fo. jumps over the fox"
    assert record["meta_info"]["finish_reason"] == {"type": "stop", "matched": matched}
    stream = (await generate(client, text="a", sampling_params=params, stream=True)).text
    texts = [json.loads(frame.removeprefix("data: "))["text"] for frame in stream.split("\n\n")[:-2]]
    assert all(later.startswith(earlier) for earlier, later in pairwise(texts))
    assert texts[-1] == record["text"]


async def test_a_stop_token_is_in_the_output_ids_but_not_in_the_text(
    client: httpx.AsyncClient, engine: Any, byte_level: Any
) -> None:
    fox, dog = (byte_level.encode(word, add_special_tokens=False)[0] for word in ("f", "d"))
    engine.script = lambda item: [fox, dog, {"type": "stop", "matched": dog}]
    record = (await generate(client, text="a")).json()
    assert record["text"] == byte_level.decode([fox])
    assert record["output_ids"] == [fox, dog]


async def test_special_tokens_are_in_the_text_on_request(
    client: httpx.AsyncClient, engine: Any, byte_level: Any
) -> None:
    start = byte_level.convert_tokens_to_ids("<|im_start|>")
    engine.script = lambda item: [start, {"type": "length", "length": 1}]
    assert (await generate(client, text="a")).json()["text"] == ""
    record = await generate(client, text="a", sampling_params={"skip_special_tokens": False})
    assert record.json()["text"] == "<|im_start|>"


async def test_an_aborted_request_is_a_result(client: httpx.AsyncClient, engine: Any) -> None:
    engine.script = lambda item: [5, ABORTED]
    response = await generate(client, text="a")
    assert response.status_code == 200
    assert response.json()["meta_info"]["finish_reason"] == ABORTED


async def test_without_tokenizer(make_engine: Callable[..., Any], make_app: Callable[..., Any]) -> None:
    engine = make_engine(None)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(make_app(engine)), base_url="http://t") as client:
        assert "text" not in (await generate(client, input_ids=[1])).json()
        refused = await generate(client, text="a")
        assert refused.status_code == 400
        assert "provide input_ids" in refused.json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            {"text": "a"},
            "The engine initialized with skip_tokenizer_init=True cannot accept text prompts. Please provide input_ids "
            "or re-initialize the engine with skip_tokenizer_init=False.",
        ),
        (
            {"input_ids": [1], "sampling_params": {"stop": "x"}},
            "stop=['x'] is unavailable when skip_tokenizer_init=True (requires tokenizer to decode tokens to text for "
            "matching).",
        ),
        (
            {"input_ids": [1], "sampling_params": {"stop_regex": ["x+"]}},
            "stop_regex=['x+'] is unavailable when skip_tokenizer_init=True (requires tokenizer to decode tokens to "
            "text for matching).",
        ),
    ],
)
async def test_with_skip_tokenizer_init(
    make_engine: Callable[..., Any], make_app: Callable[..., Any], body: dict[str, Any], message: str
) -> None:
    engine = make_engine(None)
    engine.models = [msgspec.structs.replace(engine.models[0], skip_tokenizer_init=True)]
    async with httpx.AsyncClient(transport=httpx.ASGITransport(make_app(engine)), base_url="http://t") as client:
        refused = await client.post("/generate", json=body)
        assert (refused.status_code, refused.json()["error"]["message"]) == (400, message)
        assert "text" not in (await generate(client, input_ids=[1], sampling_params={"stop_token_ids": [2]})).json()


# -- streams ---------------------------------------------------------------------------------


async def test_stream_is_cumulative_and_ends_like_the_whole_reply(client: httpx.AsyncClient, engine: Any) -> None:
    engine.says("naïve 🙂 fox")
    whole = (await generate(client, text="a")).json()
    seen = await frames(client, text="a")
    assert len(seen) > 3
    for earlier, later in pairwise(seen):
        assert later["text"].startswith(earlier["text"])
        assert later["output_ids"][: len(earlier["output_ids"])] == earlier["output_ids"]
        assert earlier["meta_info"]["finish_reason"] is None
        assert "e2e_latency" not in earlier["meta_info"]
        assert "�" not in earlier["text"]
    assert (seen[-1]["text"], seen[-1]["output_ids"]) == (whole["text"], whole["output_ids"])
    assert seen[-1]["meta_info"]["finish_reason"] == whole["meta_info"]["finish_reason"]
    assert "e2e_latency" in seen[-1]["meta_info"]
    assert all("index" not in frame for frame in seen)


async def test_stream_holds_back_the_beginning_of_a_stop_string(client: httpx.AsyncClient, engine: Any) -> None:
    engine.says("a fox jum", {"type": "stop", "matched": "x jum"})
    seen = await frames(client, text="a", sampling_params={"stop": ["x jum"]})
    assert all("a fo".startswith(frame["text"]) for frame in seen)
    assert seen[-1]["text"] == "a fo"


@pytest.mark.parametrize("where", ["request", "server"])
async def test_stream_interval(engine: Any, make_app: Callable[..., Any], where: str) -> None:
    engine.script = lambda item: [*range(5, 15), {"type": "length", "length": 10}]
    app = make_app(engine, stream_interval=4 if where == "server" else 1)
    params = {"stream_interval": 4} if where == "request" else {}
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        seen = await frames(client, text="a", sampling_params=params)
    assert [frame["meta_info"]["completion_tokens"] for frame in seen] == [1, 5, 9, 10]


async def test_batch_streams_interleave_with_an_index(client: httpx.AsyncClient, engine: Any) -> None:
    engine.script = lambda item: [*item.prompt * 3, {"type": "length", "length": 1}]
    seen = await frames(client, text=["a", "b", "c"], rid="x")
    last = {frame["index"]: frame for frame in seen}
    assert [last[index]["meta_info"]["id"] for index in range(3)] == ["x_0", "x_1", "x_2"]
    assert [last[index]["text"] for index in range(3)] == ["aaa", "bbb", "ccc"]
    ends = [frame["index"] for frame in seen if frame["meta_info"]["finish_reason"]]
    assert sorted(ends) == [0, 1, 2]
    assert {frame["index"] for frame in await frames(client, text="a", sampling_params={"n": 3})} == {0, 1, 2}
    assert await frames(client, text=[]) == []


async def test_a_stream_that_is_refused_has_an_error_frame(client: httpx.AsyncClient) -> None:
    (frame,) = await frames(client, text="a", sampling_params={"temperature": -1})
    assert frame["error"]["message"] == "temperature must be a non-negative finite number, got -1."
    assert (await generate(client, text=5, stream=True)).status_code == 400


async def test_stream_error_before_and_after_the_first_token(client: httpx.AsyncClient, engine: Any) -> None:
    engine.script = lambda item: [RequestError("broken", status=503)]
    (frame,) = await frames(client, text="a")
    assert frame["error"]["message"] == "broken"
    engine.script = lambda item: [5, RequestError("broken", status=503)]
    seen = await frames(client, text="a")
    finish = seen[-1]["meta_info"]["finish_reason"]
    assert (finish["type"], finish["message"], finish["status_code"]) == ("abort", "broken", 503)
