"""Clients of Cohere's and Hugging Face's APIs get the vectors that the native route gives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import cohere
import httpx
import numpy as np
import pytest

pytestmark = pytest.mark.clients

CLIENTS = ("cohere", "cohere-ai", "huggingface_hub")
SET = (
    "the server's address as `base_url` (Python), as `environment` and `baseUrl` (JavaScript), or as the model of "
    "`InferenceClient`"
)

TEXTS = ["A man is eating.", "Somebody has a meal.", "The sea is calm."]
LONG = "the sea is calm and " * 400
TYPES = ["float", "int8", "uint8", "binary", "ubinary", "base64"]
COHERE_AI = "cohere-ai@8.1.0"


@pytest.fixture(scope="module")
def url(vector_server: Any) -> str:
    return str(vector_server.url)


@pytest.fixture(scope="module")
def vectors(vectors_of: Callable[..., Any]) -> Any:
    """The vectors of TEXTS, ``[3, 384]``."""
    return np.array(vectors_of(TEXTS), np.float32)


@pytest.fixture
def transport() -> Iterator[httpx.Client]:
    """Connections of an SDK that is handed its client, so that they are closed."""
    with httpx.Client(timeout=60) as client:
        yield client


def test_cohere_v2(url: str, vectors: Any, transport: httpx.Client) -> None:
    client = cohere.ClientV2(api_key="none", base_url=url, httpx_client=transport)
    answer = client.embed(model="embed-v4.0", texts=TEXTS, input_type="search_document", embedding_types=TYPES)
    np.testing.assert_allclose(np.array(answer.embeddings.float_), vectors, atol=1e-5)
    np.testing.assert_array_equal(np.array(answer.embeddings.ubinary), np.packbits(vectors > 0, axis=1))
    assert np.abs(np.array(answer.embeddings.int8)).max(axis=1).tolist() == [127] * 3
    cut = client.embed(model="m", texts=[LONG], input_type="clustering", max_tokens=32)
    assert cut.meta is not None
    assert cut.meta.billed_units is not None
    assert cut.meta.billed_units.input_tokens == 32
    assert cut.meta.warnings is not None
    with pytest.raises(cohere.BadRequestError, match="longer than the model's context length"):
        client.embed(model="m", texts=[LONG], input_type="search_query", truncate="NONE")


@pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecationWarning")  # the client's own
def test_cohere_v1_splits_many_texts(url: str, vectors: Any, transport: httpx.Client) -> None:
    client = cohere.Client(api_key="none", base_url=url, httpx_client=transport)
    answer = client.embed(texts=TEXTS * 50, input_type="search_query")
    assert answer.response_type == "embeddings_floats"
    np.testing.assert_allclose(np.array(answer.embeddings), np.tile(vectors, (50, 1)), atol=1e-5)
    by_type = client.embed(texts=TEXTS, embedding_types=["binary"])
    assert by_type.response_type == "embeddings_by_type"


def test_cohere_for_javascript(url: str, vectors: Any, javascript: Callable[..., Any]) -> None:
    shown = javascript((COHERE_AI,), "use_cohere.mjs", url, json.dumps(TEXTS))
    assert shown["first"]["responseType"] == "embeddings_floats"
    np.testing.assert_allclose(shown["first"]["embeddings"], vectors, atol=1e-5)
    np.testing.assert_allclose(shown["second"]["embeddings"]["float"], vectors, atol=1e-5)
    np.testing.assert_array_equal(shown["second"]["embeddings"]["ubinary"], np.packbits(vectors > 0, axis=1))
    assert shown["second"]["meta"]["apiVersion"]["version"] == "2"
    assert shown["refused"].startswith("400 ")
    assert "texts cannot be empty" in shown["refused"]


HUB = """
import json, sys
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError
url, texts, long = json.loads(sys.argv[1])
found = []
for client in (InferenceClient(url), InferenceClient(base_url=url), InferenceClient(f"{url}/embed")):
    found.append(client.feature_extraction(texts).tolist())
    found.append(client.feature_extraction(texts[0], normalize=True, encoding_format="float").tolist())
cut = InferenceClient(url).feature_extraction(long, truncate=True, truncation_direction="left").tolist()
try:
    InferenceClient(url).feature_extraction(long)
except HfHubHTTPError as error:
    print(json.dumps([found, cut, error.response.status_code]))
"""


def test_huggingface_hub(url: str, vectors: Any) -> None:
    """In a process of its own: offline, as the tests are, the client sends nothing, not even to this machine."""
    done = subprocess.run(
        [sys.executable, "-c", HUB, json.dumps([url, TEXTS, LONG])],
        env={**os.environ, "HF_HUB_OFFLINE": "0"}, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found, cut, status = json.loads(done.stdout)
    for several, single in zip(found[::2], found[1::2], strict=True):
        np.testing.assert_allclose(several, vectors, atol=1e-5)
        np.testing.assert_allclose(single, vectors[:1], atol=1e-5)
    same = httpx.post(f"{url}/encode", json={"text": LONG, "truncate": "start"}, timeout=60).json()["embedding"]
    np.testing.assert_allclose(cut, [same], atol=1e-5)
    assert status == 400
