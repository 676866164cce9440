"""What Text Embeddings Inference has beside ``/embed``: ``POST /``, token ids, ``/decode`` and ``/info``."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import numpy as np
import pytest
from sentence_transformers.sentence_transformer.modules import Normalize

from trunkline.core import Engine
from trunkline.plugins.embedding.offline import encode


@pytest.fixture
async def live(
    saved: Callable[..., Any], engine: Callable[..., Engine], serve: Callable[..., Any]
) -> AsyncIterator[Any]:
    """(http, client, engine) on last-token pooling, 64 tokens at most."""
    folder, _ = saved(
        "qwen2", ("lasttoken", "mean"), lambda width: Normalize(),
        transformer={"processor_kwargs": {"model_max_length": 64}},
    )  # fmt: skip
    one = engine(folder)
    async with serve(one, embedding_truncate="end") as (http, client):
        yield http, client, one


async def test_the_root_embeds(live: Any) -> None:
    http, _, one = live
    body = {"inputs": ["hello", "there"], "normalize": True, "truncate": True, "truncation_direction": "right"}
    answer = await http.post("/", json=body | {"encoding_format": "float"})
    np.testing.assert_allclose(answer.json(), encode(one, ["hello", "there"]), atol=1e-6)
    refused = await http.post("/", json=body | {"encoding_format": "base64"})
    assert refused.status_code == 400
    assert "encoding_format is not supported here" in refused.json()["error"]["message"]


async def test_token_ids_are_inputs_too(live: Any) -> None:
    http, _, one = live
    ids = [one.encode("hello"), one.encode("the old sailor")]
    vectors = encode(one, ["hello", "the old sailor"])
    np.testing.assert_allclose((await http.post("/embed", json={"inputs": ids})).json(), vectors, atol=1e-6)
    np.testing.assert_allclose((await http.post("/embed", json={"inputs": ids[0]})).json(), vectors[:1], atol=1e-6)


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ([1, "a"], "inputs mixes texts and token ids"),
        ([1, [2]], "inputs mixes ids and lists of ids"),
        ([[1], []], "inputs[1]: a list of ids cannot be empty"),
        ([[1], [512]], "inputs[1]: The inputs contains values greater than the vocab size (512)"),
        ([], "inputs cannot be empty"),
    ],
)
async def test_bad_inputs(live: Any, inputs: Any, words: str) -> None:
    http, client, _ = live
    answer = await http.post("/", json={"inputs": inputs})
    assert answer.status_code == 400
    assert words in answer.json()["error"]["message"]
    assert client.submitted == 0


async def test_decode(live: Any) -> None:
    http, _, one = live
    ids = [one.encode("hello"), [*one.encode("the old sailor"), 2]]
    assert (await http.post("/decode", json={"ids": ids})).json() == ["hello", "the old sailor"]
    assert (await http.post("/decode", json={"ids": ids[0]})).json() == ["hello"]
    whole = (await http.post("/decode", json={"ids": ids, "skip_special_tokens": False})).json()
    assert whole == ["hello", "the old sailor</s>"]
    for wrong, words in (
        ([], "ids cannot be empty"),
        ([1, [2]], "ids mixes ids and lists"),
        ([[1], [-1]], "ids[1]: The ids contains a negative value"),
    ):
        answer = await http.post("/decode", json={"ids": wrong})
        assert answer.status_code == 400
        assert words in answer.json()["error"]["message"]


async def test_info(live: Any) -> None:
    http, _, one = live
    served = one.models[0]
    answer = await http.get("/info")
    assert answer.json() | {"version": "x"} == {
        "model_id": served.model_path,
        "model_sha": None,
        "model_dtype": "float32",
        "model_type": {"embedding": {"pooling": "last_token+mean"}},
        "max_concurrent_requests": 99,
        "max_input_length": 64,
        "max_batch_tokens": served.chunked_prefill_size,
        "max_batch_requests": served.max_running_requests,
        "max_client_batch_size": 8,
        "auto_truncate": True,
        "tokenization_workers": 1,
        "version": "x",
        "sha": None,
        "docker_label": None,
    }
