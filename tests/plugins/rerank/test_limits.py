"""The work of a request is bounded before it begins, whatever its texts are made of."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from transformers import PreTrainedTokenizerFast

from trunkline.core.errors import RequestError
from trunkline.core.types import ModelInfo, ServedModel
from trunkline.plugins.rerank.reranker import MAX_CHUNKED, Limits, Reranker
from trunkline.plugins.rerank.settings import RerankSettings

from .conftest import wordpiece

pytestmark = pytest.mark.field

FIRST, SECOND = "bert", "qwen3-reranker"


HUGE = "a" * 3_000_000


@pytest.mark.parametrize("model", [FIRST, SECOND])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/rerank", {"query": HUGE, "documents": ["paris"]}),
        ("/v1/rerank", {"query": "paris", "documents": ["paris", HUGE]}),
        ("/v1/rerank", {"query": "paris", "documents": [HUGE], "truncate": True}),
        ("/v1/rerank", {"query": "paris", "documents": [{"text": HUGE}], "max_chunks_per_doc": 2}),
        ("/rerank", {"query": "paris", "texts": [HUGE], "truncate": True, "truncation_direction": "left"}),
        ("/score", {"text_1": HUGE, "text_2": ["paris"]}),
        ("/score", {"text_1": ["paris"], "text_2": ["paris", HUGE]}),
    ],
)
def test_a_long_word_is_refused_wherever_it_stands(http: httpx.Client, model: str, path: str, body: Any) -> None:
    name = next(card["id"] for card in http.get("/v1/models").json()["data"] if card["id"].endswith(f"/{model}"))
    answer = http.post(path, json=body | {"model": name})
    if model == SECOND and {"truncate", "max_chunks_per_doc"} & body.keys():
        assert answer.status_code == 200  # its tokens are letters: the beginning is all that is needed
        return
    assert answer.status_code == 400
    assert "(3000000 characters)" in answer.text


def test_labels_query_and_instruction_are_bounded_too(http: httpx.Client) -> None:
    name = next(card["id"] for card in http.get("/v1/models").json()["data"] if card["id"].endswith(f"/{SECOND}"))
    for path, body in (
        ("/score", {"query": HUGE, "items": ["a"], "label_token_ids": [1, 2]}),
        ("/v1/rerank", {"query": "a", "documents": ["b"], "instruct": HUGE}),
    ):
        answer = http.post(path, json=body | {"model": name})
        assert answer.status_code == 400
        assert "characters) is longer than the model's context length (1024 tokens)" in answer.text


def test_what_is_repeated_for_each_document_counts_each_time(http: httpx.Client) -> None:
    name = next(card["id"] for card in http.get("/v1/models").json()["data"] if card["id"].endswith(f"/{SECOND}"))
    for more in ({"query": "a" * 100_000}, {"query": "a", "instruct": "b" * 100_000}):
        answer = http.post("/v1/rerank", json={"documents": ["a"] * 1000, "model": name} | more)
        assert answer.status_code == 400
        assert "characters, counting what is put before each of them; at most 33554432" in answer.text


def test_fields_of_a_document_are_joined_once(http: httpx.Client) -> None:
    document = {"text": "paris", "title": "china"}
    both = {"query": "paris", "documents": [document], "rank_fields": ["text", "title"]}
    expected = http.post("/v1/rerank", json=both).json()["results"][0]["relevance_score"]
    again = http.post("/v1/rerank", json=both | {"rank_fields": ["text", "title"] * 30}).json()
    assert again["results"][0]["relevance_score"] == expected
    assert http.post("/v1/rerank", json=both | {"rank_fields": ["text"] * 65}).status_code == 400


def make(tokenizer: PreTrainedTokenizerFast, context: int) -> Reranker:
    info = ModelInfo(
        path="/", architecture="BertForSequenceClassification", model_type="bert", context_length=context,
        vocab_size=512, hidden_size=8, causal=False,
    )  # fmt: skip
    served = ServedModel(
        name="m", model_path="m", tokenizer_path="m", info=info, tasks={}, max_total_tokens=1 << 20,
        max_running_requests=4, dtype="float32", attention_backend="cpu",
    )  # fmt: skip
    return Reranker(served, tokenizer, RerankSettings())


def test_of_one_document_a_bounded_number_of_tokens_is_split_into_chunks() -> None:
    """Nothing is left out in silence: a longer document is refused unless fewer chunks are asked for."""
    reranker = make(wordpiece(), 64)
    most = MAX_CHUNKED // 64
    fine = "paris " * (MAX_CHUNKED - 5000)
    [items] = reranker.items(["a"], [fine], Limits(64, chunks=most * 2))
    assert sum(len(item.ids) - 4 for item in items) == MAX_CHUNKED - 5000
    longer = "paris " * (MAX_CHUNKED * 4)
    with pytest.raises(RequestError, match=rf"over {MAX_CHUNKED} tokens.* max_chunks_per_doc to {most} at most"):
        reranker.items(["a"], [longer], Limits(64, chunks=most * 2))
    [items] = reranker.items(["a"], [longer], Limits(64, chunks=most))
    assert len(items) == most
    assert items[0].cut
