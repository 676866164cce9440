"""``/v1/embed`` and ``/v2/embed``: Cohere's shapes, number types, prompts and limits, with Cohere's own client."""

from __future__ import annotations

import base64
import math
from collections.abc import AsyncIterator, Callable
from typing import Any

import cohere
import httpx
import numpy as np
import pytest
from sentence_transformers import quantize_embeddings
from sentence_transformers.sentence_transformer.modules import Normalize

from trunkline.core import Engine
from trunkline.plugins.embedding.number_types import TYPES
from trunkline.plugins.embedding.offline import encode
from trunkline.plugins.embedding.prompts import prompt_for_input_type
from trunkline.plugins.embedding.recipe import Recipe

TEXTS = ["hello", "the old sailor"]
PROMPTS = {"query": "query: ", "document": "passage: ", "Clustering": "cluster: "}
ALL = ["float", "int8", "uint8", "binary", "ubinary", "base64"]


@pytest.fixture
async def live(
    saved: Callable[..., Any], engine: Callable[..., Engine], serve: Callable[..., Any]
) -> AsyncIterator[Any]:
    """(http, client, engine) on mean pooling, 64 tokens at most, with prompts."""
    folder, _ = saved(
        "qwen2", ("mean",), lambda width: Normalize(),
        transformer={"processor_kwargs": {"model_max_length": 64}}, prompts=PROMPTS,
    )  # fmt: skip
    one = engine(folder)
    async with serve(one) as (http, client):
        yield http, client, one


@pytest.fixture
async def bert(
    saved: Callable[..., Any], engine: Callable[..., Engine], serve: Callable[..., Any]
) -> AsyncIterator[Any]:
    """(http, client, engine) of a model with special tokens before and after texts, prompts and a default prompt."""
    folder, _ = saved("bert", ("mean",), lambda width: Normalize(), prompts=PROMPTS, default_prompt_name="document")
    one = engine(folder)
    async with serve(one) as (http, client):
        yield http, client, one


async def post(http: httpx.AsyncClient, path: str, **body: Any) -> Any:
    answer = await http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


# -- shapes ----------------------------------------------------------------------------------


async def test_v1_without_types_gives_lists_of_floats(live: Any) -> None:
    http, _, one = live
    answer = await post(http, "/v1/embed", texts=TEXTS, model="embed-english-v3.0")
    tokens = sum(len(one.encode(text)) for text in TEXTS)
    assert list(answer) == ["response_type", "id", "embeddings", "texts", "meta"]
    assert answer["response_type"] == "embeddings_floats"
    assert answer["texts"] == TEXTS
    assert answer["meta"] == {"api_version": {"version": "1"}, "billed_units": {"input_tokens": tokens}}
    np.testing.assert_allclose(answer["embeddings"], encode(one, TEXTS), atol=1e-6)


@pytest.mark.parametrize(("path", "version"), [("/v1/embed", "1"), ("/v2/embed", "2")])
async def test_types_give_an_object_by_type(live: Any, path: str, version: str) -> None:
    http, _, one = live
    answer = await post(http, path, texts=TEXTS, embedding_types=[*ALL, "float"])
    assert answer["response_type"] == "embeddings_by_type"
    assert answer["meta"]["api_version"] == {"version": version}
    assert list(answer["embeddings"]) == ALL
    vectors = encode(one, TEXTS)
    np.testing.assert_allclose(answer["embeddings"]["float"], vectors, atol=1e-6)
    np.testing.assert_array_equal(answer["embeddings"]["ubinary"], np.packbits(vectors > 0, axis=1))
    only = await post(http, path, texts=TEXTS, embedding_types=["binary"])
    assert list(only["embeddings"]) == ["binary"]


async def test_v2_without_types_gives_floats_by_type(live: Any) -> None:
    http, _, one = live
    for more in ({}, {"embedding_types": None}, {"embedding_types": []}):
        answer = await post(http, "/v2/embed", texts=TEXTS, **more)
        assert list(answer["embeddings"]) == ["float"]
        np.testing.assert_allclose(answer["embeddings"]["float"], encode(one, TEXTS), atol=1e-6)


async def test_inputs_are_texts(live: Any) -> None:
    http, _, one = live
    contents = [[{"type": "text", "text": "hello"}], [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]]
    answer = await post(http, "/v2/embed", inputs=[{"content": content} for content in contents])
    assert answer["texts"] == ["hello", "a\nb"]
    np.testing.assert_allclose(answer["embeddings"]["float"], encode(one, ["hello", "a\nb"]), atol=1e-6)


# -- number types ----------------------------------------------------------------------------

VECTORS = np.array(
    [[0.5, -1.0, 0.0, 0.25, 1e-9, -0.1, 0.1, 1.0, 0.3], [0.0] * 9, [-2, 1, 1, 1, 1, 1, 1, 1, -1]], np.float32
)


def test_numbers_of_each_type() -> None:
    numbers = {name: convert(VECTORS) for name, convert in TYPES.items()}
    assert numbers["float"] == VECTORS.tolist()
    assert np.array_equal([np.frombuffer(base64.b64decode(text), "<f4") for text in numbers["base64"]], VECTORS)
    assert numbers["int8"][0] == [64, -127, 0, 32, 0, -13, 13, 127, 38]
    assert numbers["int8"][1] == [0] * 9
    assert numbers["int8"][2] == [-127, 64, 64, 64, 64, 64, 64, 64, -64]
    assert numbers["uint8"] == (np.array(numbers["int8"]) + 128).tolist()
    assert numbers["ubinary"] == [[0b10011011, 0b10000000], [0, 0], [0b01111111, 0]]


def test_bits_are_sentence_transformers_own() -> None:
    for name in ("binary", "ubinary"):
        np.testing.assert_array_equal(TYPES[name](VECTORS), quantize_embeddings(VECTORS, name))  # type: ignore[arg-type]


def test_int8_keeps_directions() -> None:
    vectors = np.random.default_rng(0).standard_normal((50, 64)).astype(np.float32)
    vectors[::2] *= 0.01
    whole = np.array(TYPES["int8"](vectors), np.float32)
    cosines = (whole * vectors).sum(1) / np.linalg.norm(whole, axis=1) / np.linalg.norm(vectors, axis=1)
    assert cosines.min() > 0.9998


# -- prompts ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("input_type", "prompt"),
    [
        ("search_query", "query: "),
        ("search_document", "passage: "),
        ("clustering", "cluster: "),
        ("classification", ""),
        (None, ""),
    ],
)
async def test_input_types_choose_prompts(live: Any, input_type: str | None, prompt: str) -> None:
    http, _, one = live
    answer = await post(http, "/v2/embed", texts=TEXTS, input_type=input_type)
    theirs = encode(one, TEXTS, prompt=prompt)
    np.testing.assert_allclose(answer["embeddings"]["float"], theirs, atol=1e-6)


@pytest.mark.parametrize(
    ("prompts", "input_type", "chosen"),
    [
        ({"search_query": "a", "query": "b"}, "search_query", "a"),
        ({"passage": "a", "corpus": "b"}, "search_document", "a"),
        ({"corpus": "b"}, "search_document", "b"),
        ({"passage": "a", "document": ""}, "search_document", ""),  # as encode_document of sentence-transformers
        ({"CLASSIFICATION": "a"}, "classification", "a"),
        ({"query": "a"}, "classification", ""),
    ],
)
def test_names_of_prompts(prompts: dict[str, str], input_type: str, chosen: str) -> None:
    recipe = Recipe(modes=("mean",), normalize=True, dimensions=8, prompts=prompts)
    assert prompt_for_input_type(recipe, input_type) == chosen


async def test_without_a_prompt_for_a_type_the_default_applies(bert: Any) -> None:
    http, _, one = bert
    answer = await post(http, "/v1/embed", texts=TEXTS, input_type="classification")
    np.testing.assert_allclose(answer["embeddings"], encode(one, TEXTS, prompt="passage: "), atol=1e-5)


async def test_a_checkpoint_without_prompts_takes_every_type(
    zoo: Callable[..., Any], engine: Callable[..., Engine], serve: Callable[..., Any]
) -> None:
    one = engine(zoo("qwen2-base"))
    async with serve(one) as (http, _):
        for input_type in ("search_query", "search_document", "clustering", "classification"):
            answer = await post(http, "/v2/embed", texts=TEXTS, input_type=input_type)
            np.testing.assert_allclose(answer["embeddings"]["float"], encode(one, TEXTS), atol=1e-6)


# -- lengths ---------------------------------------------------------------------------------

LONG = "the sea " * 60 + "hello there " * 60


@pytest.mark.parametrize(("truncate", "end"), [(None, "end"), ("END", "end"), ("START", "start")])
async def test_long_texts_are_cut_with_a_warning(live: Any, truncate: str | None, end: Any) -> None:
    http, _, one = live
    answer = await post(http, "/v2/embed", texts=["short", LONG], truncate=truncate)
    np.testing.assert_allclose(answer["embeddings"]["float"][1], encode(one, [LONG], truncate=end)[0], atol=1e-5)
    whole = len(one.encode(LONG))
    assert answer["meta"]["warnings"] == [f"texts[1] was truncated: of its {whole} tokens 64 were used."]
    assert answer["meta"]["billed_units"] == {"input_tokens": 64 + len(one.encode("short"))}
    assert answer["texts"] == ["short", LONG]


@pytest.mark.parametrize("truncate", ["END", "START"])
async def test_max_tokens_cuts_texts_and_keeps_special_tokens_and_the_prompt(bert: Any, truncate: str) -> None:
    http, _, one = bert
    inner, prompt = one.encode(LONG)[1:-1], one.encode("passage: ")[:-1]
    room = 5
    most = len(prompt) + room + 1
    answer = await post(http, "/v2/embed", texts=[LONG], truncate=truncate, max_tokens=most)
    kept = inner[:room] if truncate == "END" else inner[-room:]
    same = encode(one, [[*prompt, *kept, one.encode("a")[-1]]])
    np.testing.assert_allclose(answer["embeddings"]["float"], same, atol=1e-5)
    assert answer["meta"]["billed_units"] == {"input_tokens": most}


async def test_max_tokens_beyond_the_models_limit_changes_nothing(live: Any) -> None:
    http, _, one = live
    answer = await post(http, "/v2/embed", texts=[LONG], max_tokens=1000)
    np.testing.assert_allclose(answer["embeddings"]["float"], encode(one, [LONG], truncate="end"), atol=1e-5)


async def test_output_dimension_is_matryoshka(live: Any, serve: Callable[..., Any]) -> None:
    one = live[2]
    async with serve(one, matryoshka=True) as (http, _):
        answer = await post(http, "/v2/embed", texts=TEXTS, output_dimension=16, embedding_types=["float", "ubinary"])
        theirs = encode(one, TEXTS)[:, :16]
        theirs /= np.linalg.norm(theirs, axis=1, keepdims=True)
        np.testing.assert_allclose(answer["embeddings"]["float"], theirs, atol=1e-6)
        assert [len(bits) for bits in answer["embeddings"]["ubinary"]] == [2, 2]


# -- refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "words", "param"),
    [
        ({}, "Exactly one of texts and inputs must be given", "texts"),
        ({"texts": ["a"], "inputs": []}, "Exactly one of texts and inputs must be given", "texts"),
        ({"texts": []}, "texts cannot be empty", "texts"),
        ({"inputs": []}, "inputs cannot be empty", "inputs"),
        ({"texts": ["a", ""]}, "texts[1]: texts cannot be empty", "texts[1]"),
        ({"texts": ["a"] * 9}, "texts has 9 items; at most 8 are allowed", "texts"),
        ({"images": ["data:image/png;base64,AA"]}, "images is not supported: this server takes text only", "images"),
        (
            {"inputs": [{"content": [{"type": "image_url", "image_url": {"url": "data:…"}}]}]},
            "inputs[0].content[0].image_url is not supported: this server takes text only",
            "inputs[0].content[0].image_url",
        ),
        ({"inputs": [{"content": []}]}, "inputs[0]: content must be a list of texts", "inputs[0]"),
        ({"inputs": [{"content": [{"type": "audio"}]}]}, "inputs[0]: content must be a list of texts", "inputs[0]"),
        ({"texts": ["a"], "embedding_types": ["float", "int4"]}, "got 'int4'", "embedding_types"),
        ({"texts": ["a"], "input_type": "image"}, "got 'image'. This server takes text only", "input_type"),
        ({"texts": ["a"], "input_type": "x"}, "must be one of search_query, search_document", "input_type"),
        ({"texts": ["a"], "output_dimension": 16}, "output_dimension must be 128 or left out", "output_dimension"),
        (
            {"texts": ["a", LONG], "truncate": "NONE"},
            "tokens) is longer than the model's context length (64 tokens)",
            "texts[1]",
        ),
        ({"texts": ["a", "b " * 9], "truncate": "NONE", "max_tokens": 5}, "longer than max_tokens (5)", "texts[1]"),
    ],
)
@pytest.mark.parametrize("path", ["/v1/embed", "/v2/embed"])
async def test_bad_requests_say_what_is_wrong(
    live: Any, path: str, body: dict[str, Any], words: str, param: str
) -> None:
    http, client, _ = live
    answer = await http.post(path, json=body)
    assert answer.status_code == 400, answer.text
    assert words in answer.json()["message"]
    assert answer.json()["param"] == param
    assert client.submitted == 0


@pytest.mark.parametrize("body", [{"texts": ["a"], "max_tokens": 0}, {"texts": "a"}, {"texts": ["a"], "priority": -1}])
async def test_wrong_types_and_numbers_are_refused(live: Any, body: dict[str, Any]) -> None:
    answer = await live[0].post("/v2/embed", json=body)
    assert answer.status_code == 400
    assert "$." in answer.json()["message"]


async def test_max_tokens_must_leave_room_for_a_text(bert: Any) -> None:
    http, client, one = bert
    most = len(one.encode("passage: "))
    refused = await http.post("/v2/embed", json={"texts": [LONG], "max_tokens": most})
    assert refused.json()["message"].startswith(f"max_tokens must be more than {most}, ")
    assert refused.json()["param"] == "max_tokens"
    assert client.submitted == 0
    assert (await http.post("/v2/embed", json={"texts": [LONG], "max_tokens": most + 1})).status_code == 200


# -- Cohere's client -------------------------------------------------------------------------


async def test_cohere_s_v2_client(live: Any) -> None:
    http, _, one = live
    client = cohere.AsyncClientV2(api_key="none", base_url="http://test", httpx_client=http)
    answer = await client.embed(
        model="embed-v4.0", texts=TEXTS, input_type="search_query", embedding_types=ALL, truncate="NONE", priority=5
    )
    vectors = encode(one, TEXTS, prompt_name="query")
    np.testing.assert_allclose(answer.embeddings.float_, vectors, atol=1e-6)  # type: ignore[arg-type]
    np.testing.assert_array_equal(answer.embeddings.binary, TYPES["binary"](vectors))  # type: ignore[arg-type]
    assert answer.embeddings.uint8 is not None
    assert answer.embeddings.base64 is not None
    assert answer.texts == TEXTS
    assert answer.meta is not None
    assert answer.meta.api_version is not None
    assert answer.meta.api_version.version == "2"
    assert answer.meta.billed_units is not None
    assert answer.meta.billed_units.input_tokens == sum(len(one.encode(f"query: {text}")) for text in TEXTS)
    inputs = [cohere.EmbedInput(content=[cohere.TextEmbedContent(text="hello")])]
    of_inputs = await client.embed(model="m", inputs=inputs, input_type="search_query")
    np.testing.assert_allclose(of_inputs.embeddings.float_, vectors[:1], atol=1e-6)  # type: ignore[arg-type]
    with pytest.raises(cohere.BadRequestError, match="got 'x'"):
        await client.embed(model="m", texts=["a"], input_type="x")


@pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecationWarning")  # the client's own
async def test_cohere_s_v1_client(live: Any) -> None:
    http, _, one = live
    client = cohere.AsyncClient(api_key="none", base_url="http://test", httpx_client=http)
    many = [f"text {index}" for index in range(7)]
    floats = await client.embed(texts=many, input_type="search_document")
    assert floats.response_type == "embeddings_floats"
    np.testing.assert_allclose(floats.embeddings, encode(one, many, prompt_name="document"), atol=1e-6)  # type: ignore[arg-type]
    by_type = await client.embed(texts=many, embedding_types=["int8", "float"])
    assert by_type.response_type == "embeddings_by_type"
    assert by_type.embeddings.int8 is not None  # type: ignore[union-attr]
    assert math.isclose(max(map(abs, by_type.embeddings.int8[0])), 127)  # type: ignore[union-attr]
    with pytest.raises(cohere.BadRequestError, match="longer than the model's"):
        await client.embed(texts=[LONG], truncate="NONE")
