"""``/encode``, ``/v1/embeddings`` and ``/embed``: shapes, options and refusals, over a real engine."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from sentence_transformers.sentence_transformer.modules import Normalize

from trunkline.core import Engine
from trunkline.plugins.embedding.offline import encode

Served = tuple[httpx.AsyncClient, Any]
NOT_ONE = "This model does not appear to be an embedding model by default. Please add `--is-embedding`"


@pytest.fixture
async def live(
    saved: Callable[..., Any], engine: Callable[..., Engine], serve: Callable[..., Any]
) -> AsyncIterator[Any]:
    """(http, client, engine) on mean pooling, 64 tokens at most, with prompts."""
    folder, _ = saved(
        "qwen2", ("mean",), lambda width: Normalize(),
        transformer={"processor_kwargs": {"model_max_length": 64}}, prompts={"query": "query: "},
    )  # fmt: skip
    one = engine(folder, weight_version="v7")
    async with serve(one) as (http, client):
        yield http, client, one


def message(answer: httpx.Response) -> str:
    body = answer.json()
    return str(body["error"]["message"] if "error" in body else body["message"])


# -- /encode ---------------------------------------------------------------------------------


async def test_one_text_gives_an_object_and_a_list_gives_a_list(live: Any) -> None:
    http, _, one = live
    theirs = encode(one, ["hello", "there"])
    single = (await http.post("/encode", json={"text": "hello", "model": "ignored", "sampling_params": {}})).json()
    assert list(single) == ["embedding", "meta_info"]
    np.testing.assert_allclose(single["embedding"], theirs[0], atol=1e-6)
    assert list(single["meta_info"]) == ["id", "finish_reason", "prompt_tokens", "weight_version", "e2e_latency"]
    assert single["meta_info"]["finish_reason"] == {"type": "length", "length": 0}
    assert single["meta_info"]["prompt_tokens"] == len(one.encode("hello"))
    assert single["meta_info"]["weight_version"] == "v7"
    batch = (await http.put("/encode", json={"text": ["hello", "there"], "rid": ["a", "b"]})).json()
    np.testing.assert_allclose([entry["embedding"] for entry in batch], theirs, atol=1e-6)
    assert [entry["meta_info"]["id"] for entry in batch] == ["a", "b"]
    alone = (await http.post("/encode", json={"text": ["there"]})).json()
    assert isinstance(alone, list)
    assert (await http.post("/encode", json={"text": []})).json() == []


async def test_token_ids_are_taken_as_they_are(live: Any) -> None:
    http, _, one = live
    ids = [one.encode("hello"), one.encode("there")]
    answer = (await http.post("/encode", json={"input_ids": ids})).json()
    np.testing.assert_allclose([entry["embedding"] for entry in answer], encode(one, ["hello", "there"]), atol=1e-6)
    single = (await http.post("/encode", json={"input_ids": ids[0]})).json()
    np.testing.assert_allclose(single["embedding"], answer[0]["embedding"], atol=1e-6)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "At least one of text, input_ids, or image should be provided"),
        ({"text": "a", "input_ids": [1]}, "text and input_ids cannot be provided at the same time"),
        ({"text": ""}, "texts cannot be empty"),
        ({"text": ["fine", ""]}, "text[1]: texts cannot be empty"),
        ({"text": [["query", "document"]]}, "cross-encoders; see /v1/rerank"),
        ({"input_ids": []}, "input_ids cannot be empty"),
        ({"input_ids": [1, [2]]}, "mixes ids and lists"),
        (
            {"input_ids": [[4], [5, 512]]},
            "input_ids[1]: The input_ids contains values greater than the vocab size (512): 512.",
        ),
        ({"input_ids": [-1]}, "negative"),
        ({"text": ["a", "b"], "rid": "x"}, "rid must be a list"),
        ({"text": ["a", "b"], "rid": ["x"]}, "rids length mismatch"),
        ({"text": ["a"] * 9}, "at most 8 are allowed"),
        ({"text": "a", "dimensions": 16}, "start the server with --matryoshka"),
        ({"text": "a", "prompt_name": "nope"}, "no prompt named 'nope'; there are: "),
        ({"text": "a", "prompt_name": "query", "prompt": "x"}, "leave one out"),
        ({"text": "a" * 200_000}, "(200000 characters) is longer"),
        ({"text": "a", "prompt": "x" * 200_000}, "(200001 characters) is longer"),
        ({"text": ["a"] * 8, "prompt": "x" * 5_000_000}, "40000008 characters, counting what is put before"),
        ({"text": "a", "image_data": "x.png"}, "image_data is not supported: this server takes text only."),
        ({"text": "a", "is_cross_encoder_request": True}, "is_cross_encoder_request is not supported; see /v1/rerank."),
        ({"text": ["fine", "e " * 100]}, "text[1]: The input (101 tokens) is longer than"),
    ],
)
async def test_bad_requests_say_what_is_wrong_and_compute_nothing(live: Any, body: dict[str, Any], words: str) -> None:
    http, client, _ = live
    answer = await http.post("/encode", json=body)
    assert answer.status_code == 400
    assert words in message(answer)
    assert list(answer.json()) == ["error"]
    assert client.submitted == 0


async def test_wrong_types_are_shape_2(live: Any) -> None:
    for body in ({"text": 5}, {"text": "a", "truncate": "middle"}, {"text": "a", "dimensions": 0}):
        answer = await live[0].post("/encode", json=body)
        assert answer.status_code == 400
        assert answer.json()["object"] == "error"


async def test_options_change_what_they_say(live: Any) -> None:
    http, _, one = live

    async def ask(**options: Any) -> np.ndarray:
        answer = await http.post("/encode", json={"text": "hello there", **options})
        return np.array(answer.json()["embedding"])

    plain = await ask()
    assert np.linalg.norm(plain) == pytest.approx(1.0, abs=1e-5)
    raw = await ask(normalize=False)
    assert np.linalg.norm(raw) > 2
    np.testing.assert_allclose(raw / np.linalg.norm(raw), plain, atol=1e-5)
    np.testing.assert_allclose(await ask(prompt_name="query"), encode(one, ["query: hello there"])[0], atol=1e-6)
    np.testing.assert_allclose(await ask(prompt="do: "), encode(one, ["do: hello there"])[0], atol=1e-6)


@pytest.mark.parametrize("how", ["start", "end", True])
async def test_truncation_is_reported_per_item(live: Any, how: Any) -> None:
    http, _, one = live
    long = "e t a o i n s h r d l u " * 10
    ids = one.encode(long)
    kept = ids[-64:] if how == "start" else ids[:64]
    answer = (await http.post("/encode", json={"text": ["short", long], "truncate": how})).json()
    assert "truncated" not in answer[0]["meta_info"]
    assert answer[1]["meta_info"]["truncated"] is True
    assert answer[1]["meta_info"]["original_tokens"] == len(ids)
    assert answer[1]["meta_info"]["prompt_tokens"] == 64
    np.testing.assert_allclose(answer[1]["embedding"], encode(one, [kept])[0], atol=1e-6)


async def test_a_prompt_survives_truncation_at_the_start(live: Any) -> None:
    http, _, one = live
    long = "e t a o i n s h r d l u " * 10
    prompt, ids = one.encode("query: "), one.encode("query: " + long)
    kept = ids[: len(prompt)] + ids[len(prompt) - 64 :]
    body = {"text": long, "prompt_name": "query", "truncate": "start"}
    answer = (await http.post("/encode", json=body)).json()
    np.testing.assert_allclose(answer["embedding"], encode(one, [kept])[0], atol=1e-6)


async def test_the_server_may_truncate_by_default(live: Any, serve: Callable[..., Any]) -> None:
    async with serve(live[2], embedding_truncate="end") as (http, _):
        assert (await http.post("/encode", json={"text": "e " * 100})).json()["meta_info"]["truncated"] is True
        assert (await http.post("/encode", json={"text": "e " * 100, "truncate": "none"})).status_code == 400


async def test_a_generation_model_says_how_to_embed_with_it(
    zoo: Callable[[str], Path], engine: Callable[..., Engine], serve: Callable[..., Any]
) -> None:
    async with serve(engine(zoo("llama"))) as (http, _):
        for path, body in (("/encode", {"text": "a"}), ("/v1/embeddings", {"input": "a"}), ("/embed", {"inputs": "a"})):
            answer = await http.post(path, json=body)
            assert answer.status_code == 400
            assert message(answer).startswith(NOT_ONE)
            assert "--task generation,embedding" in message(answer)


# -- /v1/embeddings --------------------------------------------------------------------------


async def test_openai_s_shape(live: Any) -> None:
    http, _, one = live
    theirs = encode(one, ["hello", "there you"])
    body = {"input": ["hello", "there you"], "model": "any", "user": "me"}
    answer = (await http.post("/v1/embeddings", json=body)).json()
    assert answer["object"] == "list"
    assert answer["model"] == one.models[0].model_path
    assert [(entry["object"], entry["index"]) for entry in answer["data"]] == [("embedding", 0), ("embedding", 1)]
    np.testing.assert_allclose([entry["embedding"] for entry in answer["data"]], theirs, atol=1e-6)
    count = len(one.encode("hello")) + len(one.encode("there you"))
    assert answer["usage"] == {"prompt_tokens": count, "total_tokens": count, "completion_tokens": 0}
    coded = (await http.post("/v1/embeddings", json=body | {"encoding_format": "base64"})).json()
    vectors = [np.frombuffer(base64.b64decode(entry["embedding"]), "<f4") for entry in coded["data"]]
    np.testing.assert_allclose(vectors, theirs, atol=1e-6)


async def test_all_four_kinds_of_input_agree(live: Any) -> None:
    http, _, one = live
    ids = one.encode("hello")
    answers = [
        (await http.post("/v1/embeddings", json={"input": given})).json() for given in ("hello", ["hello"], ids, [ids])
    ]
    for answer in answers:
        assert len(answer["data"]) == 1
        np.testing.assert_allclose(answer["data"][0]["embedding"], answers[0]["data"][0]["embedding"], atol=1e-6)


@pytest.mark.field
async def test_normalize_and_the_request_s_id_are_honoured_by_openai_s_route_too(live: Any) -> None:
    http, _, one = live
    own = encode(one, ["hello"], normalize=False)[0]
    assert abs(np.linalg.norm(own) - 1) > 0.01
    for normalize, expected in ((False, own), (None, own / np.linalg.norm(own))):
        answer = await http.post("/v1/embeddings", json={"input": "hello", "normalize": normalize, "rid": "mine"})
        np.testing.assert_allclose(answer.json()["data"][0]["embedding"], expected, atol=1e-5)
    jina = {"input": "hello", "normalized": False, "embedding_type": "float", "late_chunking": False}
    answer = await http.post("/v1/embeddings", json=jina)
    np.testing.assert_allclose(answer.json()["data"][0]["embedding"], own, atol=1e-5)
    twice = await http.post("/v1/embeddings", json={"input": ["a", "b"], "rid": ["x", "x"]})
    assert "Duplicate request IDs" in message(twice)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"input": ""}, "Input cannot be empty"),
        ({"input": []}, "Input cannot be empty"),
        ({"input": " \n"}, "Input cannot be empty or whitespace only"),
        ({"input": ["a", " "]}, "input[1]: Input cannot be empty or whitespace only"),
        ({"input": [[4], []]}, "input[1]: Input cannot be empty"),
        ({"input": ["a", 5]}, "only texts, only token ids, or only lists"),
        ({"input": [[1, 100257]]}, "check_embedding_ctx_length=False"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format must be float or base64"),
        ({"input": "a", "dimensions": 8}, "--matryoshka"),
        ({"input": ["a", "e " * 100]}, "input[1]: The input (101 tokens) is longer"),
        ({"input": "e " * 100}, "The input (101 tokens) is longer"),
        ({"input": ["a"] * 9}, "input has 9 items; at most 8 are allowed"),
        ({"input": [[1, 4], [1, -4]]}, "input[1]: The input contains a negative value: -4."),
    ],
)
async def test_openai_s_refusals_are_flat(live: Any, body: dict[str, Any], words: str) -> None:
    answer = await live[0].post("/v1/embeddings", json=body)
    assert answer.status_code == 400
    assert words in answer.json()["message"]
    assert answer.json()["type"] == "BadRequestError"
    assert answer.json()["param"] in (*body, "input[0]", "input[1]")
    assert words.startswith("input[1]: ") == (answer.json()["param"] == "input[1]")


async def test_dimensions_of_matryoshka_models(live: Any, serve: Callable[..., Any]) -> None:
    one = live[2]
    whole = encode(one, ["hello"])[0]
    async with serve(one, matryoshka=True) as (http, _):
        answer = (await http.post("/v1/embeddings", json={"input": "hello", "dimensions": 16})).json()
        cut = whole[:16] / np.linalg.norm(whole[:16])
        np.testing.assert_allclose(answer["data"][0]["embedding"], cut, atol=1e-6)
        mixed = (await http.post("/encode", json={"text": "hello", "dimensions": 16, "normalize": False})).json()
        assert np.linalg.norm(mixed["embedding"]) > 1.01
        same = await http.post("/v1/embeddings", json={"input": "hello", "dimensions": 128})
        np.testing.assert_allclose(same.json()["data"][0]["embedding"], whole, atol=1e-6)
        refused = await http.post("/v1/embeddings", json={"input": "hello", "dimensions": 129})
        assert "dimensions must be at most 128" in refused.json()["message"]


@pytest.mark.field
async def test_the_models_own_width_is_always_allowed_for_dimensions(live: Any) -> None:
    """mteb and others always send it, also for models that weren't trained for shorter vectors."""
    http, _, one = live
    whole = encode(one, ["hello"])[0]
    native = (await http.post("/encode", json={"text": "hello", "dimensions": 128})).json()["embedding"]
    openai = (await http.post("/v1/embeddings", json={"input": "hello", "dimensions": 128})).json()["data"][0]
    [tei] = (await http.post("/embed", json={"inputs": "hello", "dimensions": 128})).json()
    for vector in (native, openai["embedding"], tei, encode(one, ["hello"], dimensions=128)[0]):
        np.testing.assert_allclose(vector, whole, atol=1e-6)
    for length in (127, 129):
        refused = await http.post("/v1/embeddings", json={"input": "hello", "dimensions": length})
        assert refused.status_code == 400
        assert f"dimensions must be 128 or left out, got {length}" in refused.json()["message"]


async def test_the_real_sdk_reads_the_answers(live: Any) -> None:
    import openai

    http, _, one = live
    theirs = encode(one, ["hello", "there you"])
    async with openai.AsyncOpenAI(api_key="none", base_url="http://test/v1", http_client=http) as sdk:
        default = await sdk.embeddings.create(input=["hello", "there you"], model="m")  # the SDK asks for base64
        np.testing.assert_allclose([entry.embedding for entry in default.data], theirs, atol=1e-6)
        floats = await sdk.embeddings.create(input=one.encode("hello"), model="m", encoding_format="float")
        np.testing.assert_allclose(floats.data[0].embedding, theirs[0], atol=1e-6)
        assert floats.usage.prompt_tokens == len(one.encode("hello"))
        with pytest.raises(openai.BadRequestError, match="longer than the model's context length"):
            await sdk.embeddings.create(input="e " * 100, model="m")


# -- token ids of another tokenizer ----------------------------------------------------------

CL100K = {"A man is eating.": [32, 893, 374, 12459, 13], "Hello world": [9906, 1917]}  # as tiktoken writes them


@pytest.mark.field
@pytest.mark.parametrize("given", [*CL100K.values(), list(CL100K.values())])
async def test_ids_of_openais_tokenizer_are_refused(
    minilm: Path, engine: Callable[..., Engine], serve: Callable[..., Any], given: Any
) -> None:
    """LangChain's OpenAIEmbeddings sends them by default; all are in the vocabulary of all-MiniLM-L6-v2."""
    one = engine(minilm)
    async with serve(one) as (http, client):
        answer = await http.post("/v1/embeddings", json={"input": given})
        assert answer.status_code == 400
        assert "check_embedding_ctx_length=False" in answer.json()["message"]
        assert "begin with [CLS] [101] and end with [SEP] [102]" in answer.json()["message"]
        assert answer.json()["param"] == ("input" if isinstance(given[0], int) else "input[0]")
        assert client.submitted == 0
        text = (await http.post("/v1/embeddings", json={"input": list(CL100K)})).json()
        ids = (await http.post("/v1/embeddings", json={"input": [one.encode(text) for text in CL100K]})).json()
        assert ids["data"] == text["data"]


@pytest.mark.field
@pytest.mark.parametrize(
    ("name", "wrong", "place"),
    [
        ("bert", [[2], [3], [2, 9], [9, 3], [9, 2, 9, 3], [2, 9, 3, 0]], "begin with [CLS] [2] and end with [SEP] [3]"),
        ("qwen2-base", [[9], [9, 9], [2, 9]], "don't end with </s> [2], as"),
    ],
)  # fmt: skip
async def test_ids_need_the_special_tokens_that_the_tokenizer_adds(
    zoo: Callable[[str], Path], engine: Callable[..., Engine], serve: Callable[..., Any],
    name: str, wrong: list[list[int]], place: str,
) -> None:  # fmt: skip
    one = engine(zoo(name))
    right = one.encode("hello")
    theirs = encode(one, [right, *wrong])
    async with serve(one) as (http, _):
        for ids in wrong:
            answer = await http.post("/v1/embeddings", json={"input": [right, ids]})
            assert answer.status_code == 400, ids
            assert answer.json()["message"].startswith("input[1]: The token ids don't ")
            assert place in answer.json()["message"]
        # Native routes trust their callers.
        native = (await http.post("/encode", json={"input_ids": [right, *wrong]})).json()
        np.testing.assert_allclose([entry["embedding"] for entry in native], theirs, atol=1e-6)
    async with serve(one, embedding_ids="trust") as (http, _):
        answer = (await http.post("/v1/embeddings", json={"input": [right, *wrong]})).json()
        np.testing.assert_allclose([entry["embedding"] for entry in answer["data"]], theirs, atol=1e-6)


@pytest.mark.field
async def test_ids_outside_the_vocabulary_are_refused_with_advice(live: Any) -> None:
    answer = (await live[0].post("/v1/embeddings", json={"input": [[9], [512]]})).json()
    assert answer["message"].startswith("input[1]: The input contains values greater than the vocab size (512): 512. ")
    assert "Were they made with another model's tokenizer? Send text instead" in answer["message"]
    native = (await live[0].post("/encode", json={"input_ids": [[9], [512]]})).json()
    assert native["error"]["message"].endswith("the vocab size (512): 512.")


@pytest.mark.field
async def test_a_tokenizer_without_special_tokens_takes_all_ids(live: Any) -> None:
    """Nothing tells its own ids from others there."""
    assert (await live[0].post("/v1/embeddings", json={"input": [[9, 19], [4]]})).status_code == 200


# -- /embed ----------------------------------------------------------------------------------


async def test_tei_gets_bare_vectors(live: Any) -> None:
    http, _, one = live
    theirs = encode(one, ["hello", "there"])
    answer = await http.post("/embed", json={"inputs": ["hello", "there"], "truncate": True})
    np.testing.assert_allclose(answer.json(), theirs, atol=1e-6)
    assert "x-truncated-inputs" not in answer.headers
    np.testing.assert_allclose((await http.post("/embed", json={"inputs": "hello"})).json(), theirs[:1], atol=1e-6)
    raw = (await http.post("/embed", json={"inputs": "hello", "normalize": False})).json()
    assert np.linalg.norm(raw[0]) > 2
    named = (await http.post("/embed", json={"inputs": "hello", "prompt_name": "query"})).json()
    np.testing.assert_allclose(named, encode(one, ["query: hello"]), atol=1e-6)


SIDES = ("Left", "Right")


async def test_tei_s_truncation(live: Any) -> None:
    http = live[0]
    body = {"inputs": ["short", "e " * 100]}
    refused = await http.post("/embed", json=body)
    assert refused.status_code == 400
    assert message(refused).startswith("inputs[1]: ")
    cut = await http.post("/embed", json=body | {"truncate": True})
    assert cut.status_code == 200
    assert cut.headers["x-truncated-inputs"] == "1"
    ends = {"inputs": "the sea " * 60 + "hello there " * 60, "truncate": True}
    kept = {side: (await http.post("/embed", json=ends | {"truncation_direction": side})).json() for side in SIDES}
    for side, end in zip(SIDES, ("start", "end"), strict=True):
        same = (await http.post("/encode", json={"text": ends["inputs"], "truncate": end})).json()
        np.testing.assert_allclose(kept[side][0], same["embedding"], atol=1e-5)
    assert kept["Left"] != kept["Right"]
    for nothing in ([], ""):
        assert message(await http.post("/embed", json={"inputs": nothing})) == "inputs cannot be empty."


@pytest.mark.parametrize("body", [{"text": "a"}, {"text": "a", "prompt_name": "query", "truncate": "start"}])
async def test_without_a_tokenizer_ids_are_embedded_and_texts_refused(
    saved: Callable[..., Any], engine: Callable[..., Engine], serve: Callable[..., Any], body: dict[str, Any]
) -> None:
    folder, _ = saved("qwen2", ("mean",), lambda width: Normalize(), prompts={"query": "query: "})
    one = engine(folder, skip_tokenizer_init=True)
    async with serve(one) as (http, _):
        assert (await http.post("/encode", json={"input_ids": [5, 6]})).status_code == 200
        answer = await http.post("/encode", json=body)
        assert answer.status_code == 400
        assert "initialized with skip_tokenizer_init=True cannot accept text prompts" in message(answer)
