"""Every dialect against a live server: real clients, shapes, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import cohere
import httpx
import pytest
from transformers import AutoTokenizer

QUERY = "what is the capital of china?"
DOCUMENTS = ["the capital of china is beijing.", "gravity is a force", "paris"]
BODY = {"query": QUERY, "documents": DOCUMENTS}


@pytest.fixture
def transport() -> Iterator[httpx.Client]:
    """Connections of an SDK that is handed its client, so that they are closed."""
    with httpx.Client(timeout=60) as client:
        yield client


def named(http: httpx.Client, name: str) -> str:
    """The served name (a path) of a model."""
    names = [str(card["id"]) for card in http.get("/v1/models").json()["data"]]
    return next(one for one in names if one.endswith(f"/{name}"))


def post(http: httpx.Client, path: str, body: Any) -> Any:
    answer = http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def logits(http: httpx.Client, **more: Any) -> list[float]:
    """Raw scores in the order of the documents."""
    entries = post(http, "/rerank", {"query": QUERY, "texts": DOCUMENTS, "raw_scores": True, **more})
    return [entry["score"] for entry in sorted(entries, key=lambda entry: int(entry["index"]))]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# -- dialects --------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["POST", "PUT"])
def test_sglang_gets_a_bare_sorted_list(http: httpx.Client, method: str) -> None:
    answer = http.request(method, "/v1/rerank", json=BODY)
    assert answer.status_code == 200
    entries = answer.json()
    raw = logits(http)
    order = sorted(range(3), key=lambda index: -raw[index])
    assert [entry["index"] for entry in entries] == order
    for entry in entries:
        assert set(entry) == {"score", "document", "index", "meta_info"}
        assert entry["document"] == DOCUMENTS[entry["index"]]
        assert entry["score"] == pytest.approx(raw[entry["index"]]), "no activation: the raw logit"
        meta = entry["meta_info"]
        assert set(meta) == {"id", "finish_reason", "prompt_tokens", "weight_version", "e2e_latency", "cached_tokens"}
        assert meta["finish_reason"] == {"type": "length", "length": 0}
        assert answer.headers["x-request-id"].rsplit("_", 1)[0] == meta["id"].rsplit("_", 1)[0]


def test_sglang_options(http: httpx.Client) -> None:
    best, *_ = post(http, "/v1/rerank", BODY)
    [alone] = post(http, "/v1/rerank", BODY | {"top_n": 1, "return_documents": False})
    assert alone["index"] == best["index"]
    assert "document" not in alone
    assert len(post(http, "/v1/rerank", BODY | {"top_n": 50})) == 3
    assert post(http, "/v1/rerank", BODY | {"top_n": None, "return_documents": None, "online": 1})[0]["document"]


def test_jina(http: httpx.Client) -> None:
    answer = post(http, "/rerank", BODY | {"top_n": 2})
    assert set(answer) == {"id", "model", "results", "usage"}
    assert answer["model"] == named(http, "bert")
    raw = logits(http)
    scores = [result["relevance_score"] for result in answer["results"]]
    assert scores == sorted(scores, reverse=True)
    assert len(scores) == 2
    for result in answer["results"]:
        assert set(result) == {"index", "relevance_score", "document"}
        assert result["document"] == {"text": DOCUMENTS[result["index"]]}
        assert result["relevance_score"] == pytest.approx(sigmoid(raw[result["index"]]))
    counted = sum(entry["meta_info"]["prompt_tokens"] for entry in post(http, "/v1/rerank", BODY))
    assert answer["usage"]["total_tokens"] == answer["usage"]["prompt_tokens"] == counted
    without = post(http, "/rerank", BODY | {"return_documents": False})["results"]
    assert all(set(result) == {"index", "relevance_score"} for result in without)


def test_tei(http: httpx.Client) -> None:
    entries = post(http, "/rerank", {"query": QUERY, "texts": DOCUMENTS})
    raw = logits(http)
    assert all(set(entry) == {"index", "score"} for entry in entries)
    assert [entry["score"] for entry in entries] == pytest.approx(sorted(map(sigmoid, raw), reverse=True))
    texts = post(http, "/rerank", {"query": QUERY, "texts": DOCUMENTS, "return_text": True})
    assert [entry["text"] for entry in texts] == [DOCUMENTS[entry["index"]] for entry in texts]


def test_format_chooses(http: httpx.Client) -> None:
    assert "usage" in post(http, "/v1/rerank?format=jina", BODY)
    assert "meta" in post(http, "/v1/rerank?format=cohere", BODY)
    assert isinstance(post(http, "/rerank?format=sglang", BODY), list)
    assert set(post(http, "/v1/rerank?format=tei", BODY)[0]) == {"index", "score"}
    refused = http.post("/v1/rerank?format=xml", json=BODY)
    assert (refused.status_code, refused.json()["param"]) == (400, "format")
    assert "'xml'" in refused.json()["message"]


@pytest.mark.field
@pytest.mark.parametrize(
    "headers",
    [
        {"x-fern-language": "JavaScript", "x-fern-sdk-name": "cohere-ai", "user-agent": "cohere-ai/8.1.0"},
        {"x-fern-sdk-name": "cohere-ai"},
        {"user-agent": "cohere-ai/8.1.0"},
        {"x-fern-language": "Python", "x-fern-sdk-name": "cohere", "user-agent": "cohere/7.3.1"},
        {"x-fern-language": "JAVA", "x-fern-sdk-name": "com.cohere.fern:api-sdk"},
        {"x-fern-sdk-name": "github.com/cohere-ai/cohere-go/v2"},
    ],
)
def test_coheres_sdks_get_its_object_on_v1(http: httpx.Client, headers: dict[str, str]) -> None:
    """What cohere-ai 8.1.0 for JavaScript sends; a bare list gives it no results."""
    body = {"model": "m", "query": QUERY, "documents": DOCUMENTS, "top_n": 2, "return_documents": True}
    answer = http.post("/v1/rerank", json=body | {"model": named(http, "bert")}, headers=headers).json()
    assert set(answer) == {"id", "results", "meta"}
    assert answer["meta"]["api_version"] == {"version": "1"}
    assert [set(result) for result in answer["results"]] == [{"index", "relevance_score", "document"}] * 2


@pytest.mark.field
def test_litellm_gets_an_object_on_v1(http: httpx.Client) -> None:
    """What LiteLLM 1.110.2 sends for jina_ai/ (and hosted_vllm/ with /v1) and, last, for huggingface/."""
    headers, model = {"user-agent": "litellm/1.110.2"}, named(http, "bert")
    body = {"model": model, "query": QUERY, "top_n": 2, "documents": DOCUMENTS, "return_documents": True}
    answer = http.post("/v1/rerank", json=body, headers=headers).json()
    assert set(answer) == {"id", "model", "results", "usage"}
    for result in answer["results"]:
        assert 0 < result["relevance_score"] < 1
        assert result["document"] == {"text": DOCUMENTS[result["index"]]}
    assert answer["usage"]["total_tokens"] > 0
    chosen = http.post("/v1/rerank?format=sglang", json=body, headers=headers).json()
    assert isinstance(chosen, list)
    texts = {"raw_scores": False, "truncation_direction": "Right", "query": QUERY, "top_n": 2, "texts": DOCUMENTS}
    for path in ("/rerank", "/v1/rerank"):
        ranked = http.post(path, json=texts | {"return_text": True, "model": model}, headers=headers).json()
        assert [set(entry) for entry in ranked] == [{"index", "score", "text"}] * 2
        assert all(0 < entry["score"] < 1 for entry in ranked)


@pytest.mark.field
@pytest.mark.parametrize("agent", ["python-requests/2.34.2", "python-httpx/0.28.1", "curl/8.14.1", "reqwest", ""])
def test_everybody_else_gets_sglangs_list_on_v1(http: httpx.Client, agent: str) -> None:
    """Routers answer 500 to anything else."""
    assert isinstance(http.post("/v1/rerank", json=BODY, headers={"user-agent": agent}).json(), list)


def test_cohere_s_v1_client(url: str, http: httpx.Client, transport: httpx.Client) -> None:
    client = cohere.Client(api_key="none", base_url=url, httpx_client=transport)
    answer = client.rerank(query=QUERY, documents=DOCUMENTS, top_n=2)
    raw = logits(http)
    assert [result.index for result in answer.results] == sorted(range(3), key=lambda index: -raw[index])[:2]
    assert [result.relevance_score for result in answer.results] == pytest.approx(
        sorted(map(sigmoid, raw), reverse=True)[:2]
    )
    assert answer.results[0].document is None
    assert answer.meta is not None
    assert answer.meta.api_version is not None
    assert answer.meta.api_version.version == "1"
    documents = [{"text": "gravity", "title": "force"}, {"text": "paris", "title": "the capital of france"}]
    with_documents = client.rerank(query=QUERY, documents=documents, return_documents=True)
    assert {result.document.text for result in with_documents.results if result.document} == {"gravity", "paris"}


def test_cohere_s_v2_client(url: str, http: httpx.Client, transport: httpx.Client) -> None:
    client = cohere.ClientV2(api_key="none", base_url=url, httpx_client=transport)
    model = named(http, "bert")
    answer = client.rerank(model=model, query=QUERY, documents=DOCUMENTS, priority=3)
    raw = logits(http)
    assert [result.index for result in answer.results] == sorted(range(3), key=lambda index: -raw[index])
    assert answer.meta is not None
    assert answer.meta.warnings is None
    cut = client.rerank(model=model, query=QUERY, documents=["paris " * 90, "paris"], max_tokens_per_doc=2)
    assert cut.meta is not None
    assert cut.meta.warnings is not None
    assert len(cut.meta.warnings) == 1
    assert cut.meta.warnings[0].startswith("documents[0] was truncated: of the pair's ")
    whole = client.rerank(model=model, query=QUERY, documents=["paris paris"])
    by_index = {result.index: result.relevance_score for result in cut.results}
    assert by_index[0] == pytest.approx(whole.results[0].relevance_score), "two tokens of the document were used"
    with pytest.raises(cohere.BadRequestError, match="Query cannot be empty"):
        client.rerank(model=model, query="", documents=DOCUMENTS)


def test_rank_fields(http: httpx.Client) -> None:
    documents = [{"title": "china", "text": "gravity"}, {"title": "france", "text": "gravity", "note": None}]
    for document in documents:  # one by one: which of several share a pass is a race, and moves last bits
        answer = post(http, "/v1/rerank", {"query": QUERY, "documents": [document], "rank_fields": ["title"]})
        plain = post(http, "/rerank", {"query": QUERY, "texts": [document["title"]]})
        assert [one["relevance_score"] for one in answer["results"]] == [one["score"] for one in plain]
    both = post(http, "/v1/rerank", {"query": QUERY, "documents": documents[:1], "rank_fields": ["title", "text"]})
    [joined] = post(http, "/rerank", {"query": QUERY, "texts": ["title: china\ntext: gravity"]})
    assert both["results"][0]["relevance_score"] == joined["score"]


def test_chunks_count_by_their_best(http: httpx.Client) -> None:
    """Cohere's v1 API: a document that is too long for the model is scored piece by piece."""
    tokenizer = AutoTokenizer.from_pretrained(named(http, "bert"))
    fixed = len(tokenizer(QUERY, "paris")["input_ids"]) - 1
    room = 1024 - fixed
    words = ["gravity"] * room + ["paris"] * room + ["force"] * 10
    chunks = [" ".join(words[start : start + room]) for start in range(0, len(words), room)]
    alone = [post(http, "/v1/rerank?format=cohere", {"query": QUERY, "documents": [one]}) for one in chunks]
    scores = [one["results"][0]["relevance_score"] for one in alone]
    whole = {"query": QUERY, "documents": [" ".join(words)]}
    all_three = post(http, "/v1/rerank?format=cohere", whole)
    assert all_three["results"][0]["relevance_score"] == pytest.approx(max(scores))
    assert "warnings" not in all_three["meta"]
    assert all_three["meta"]["tokens"]["input_tokens"] == len(words) + 3 * fixed
    first = post(http, "/v1/rerank", whole | {"max_chunks_per_doc": 1})
    assert first["results"][0]["relevance_score"] == pytest.approx(scores[0])
    assert len(first["meta"]["warnings"]) == 1


def test_chunks_are_bounded_like_items(http: httpx.Client) -> None:
    """By default there are as few chunks as keep a request within --max-batch-size; more than asked is a 400."""
    documents = ["paris " * 1500] * 3
    refused = http.post(
        "/v1/rerank", json={"query": "paris " * 1019, "documents": documents, "max_chunks_per_doc": 1000}
    )
    assert refused.status_code == 400
    assert "chunks; at most 1024 are allowed. Lower max_chunks_per_doc" in refused.text


# -- truncation ------------------------------------------------------------------------------


def test_truncation_is_per_document_and_reported(http: httpx.Client) -> None:
    documents = ["paris", "paris " * 2000]
    refused = http.post("/v1/rerank", json={"query": QUERY, "documents": documents})
    assert refused.status_code == 400
    assert refused.json()["message"].startswith("documents[1]: The input (20")
    for truncate in ("end", "start", True):
        entries = post(http, "/v1/rerank", {"query": QUERY, "documents": documents, "truncate": truncate})
        metas = {entry["index"]: entry["meta_info"] for entry in entries}
        assert "truncated" not in metas[0]
        assert (metas[1]["truncated"], metas[1]["prompt_tokens"]) == (True, 1024)
        assert metas[1]["original_tokens"] > 2000
    for path, body in (("/rerank", {"texts": documents}), ("/rerank", {"documents": documents})):
        answer = post(http, path, {"query": QUERY, "truncate": True, **body})
        listed = answer if isinstance(answer, list) else answer["results"]
        assert {entry["index"]: entry.get("truncated", False) for entry in listed} == {0: False, 1: True}


def test_tei_s_direction(http: httpx.Client) -> None:
    texts = ["paris " * 1500 + "gravity " * 1500]

    def cut(**how: Any) -> float:
        [entry] = post(http, "/rerank", {"query": QUERY, "texts": texts, "raw_scores": True, **how})
        return float(entry["score"])

    right, left = cut(truncate=True), cut(truncate=True, truncation_direction="Left")
    assert right == cut(truncate="end", truncation_direction="Right") != left
    assert left == cut(truncate="start")


# -- /score ----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/score", "/v1/score"])
def test_pairs_of_texts(http: httpx.Client, path: str) -> None:
    answer = post(http, path, {"text_1": QUERY, "text_2": DOCUMENTS})
    assert (answer["object"], answer["model"]) == ("list", named(http, "bert"))
    raw = logits(http)
    assert [one["score"] for one in answer["data"]] == pytest.approx(raw)
    assert [(one["index"], one["object"]) for one in answer["data"]] == [(index, "score") for index in range(3)]
    one_by_one = post(http, path, {"text_1": [QUERY] * 3, "text_2": DOCUMENTS, "use_activation": True})
    assert [one["score"] for one in one_by_one["data"]] == pytest.approx([sigmoid(one) for one in raw])
    single = post(http, path, {"text_1": QUERY, "text_2": DOCUMENTS[1]})
    assert [one["score"] for one in single["data"]] == pytest.approx(raw[1:2])


def test_items_of_a_cross_encoder(http: httpx.Client) -> None:
    answer = post(http, "/v1/score", {"query": QUERY, "items": DOCUMENTS})
    raw = logits(http)
    assert answer["object"] == "scoring"
    assert [row[0] for row in answer["scores"]] == pytest.approx(raw)
    for document in DOCUMENTS:  # one by one, as above
        swapped = post(http, "/v1/score", {"query": QUERY, "items": [document], "item_first": True})
        pairs = post(http, "/score", {"text_1": [document], "text_2": [QUERY]})
        assert [row[0] for row in swapped["scores"]] == [one["score"] for one in pairs["data"]]


@pytest.mark.parametrize("item_first", [False, True])
def test_label_tokens(http: httpx.Client, item_first: bool) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    name = named(http, "qwen3-reranker")
    tokenizer, whole = AutoTokenizer.from_pretrained(name), AutoModelForCausalLM.from_pretrained(name)
    labels = [tokenizer.convert_tokens_to_ids(token) for token in ("yes", "no", "a")]
    query, items = "is this the answer? ", ["the sky is blue", "no", "it is"]
    texts = [item + query if item_first else query + item for item in items]
    with torch.inference_mode():
        last = [whole(input_ids=torch.tensor([tokenizer.encode(text)])).logits[0, -1].double() for text in texts]
    body = {"query": query, "items": items, "label_token_ids": labels, "model": name, "item_first": item_first}
    answer = post(http, "/v1/score", body)
    for row, own in zip(answer["scores"], last, strict=True):
        assert row == pytest.approx(own.softmax(0)[labels].tolist(), abs=1e-4)
    softmax = post(http, "/score", body | {"apply_softmax": True})
    for row, own in zip(softmax["scores"], last, strict=True):
        assert row == pytest.approx(own[labels].softmax(0).tolist(), abs=1e-4)
        assert sum(row) == pytest.approx(1)
    ids = {"query": tokenizer.encode(query), "items": [tokenizer.encode(item) for item in items]}
    if not item_first:  # where texts are joined a token may span both
        assert post(http, "/score", body | ids)["scores"][1] == pytest.approx(answer["scores"][1], abs=1e-4)
        assert answer["usage"]["prompt_tokens"] == sum(len(tokenizer.encode(text)) for text in texts)
        single = post(http, "/score", body | {"items": items[2]})
        assert single["scores"][0] == pytest.approx(answer["scores"][2], abs=1e-4)


# -- causal rerankers ------------------------------------------------------------------------


def test_a_query_s_documents_share_its_prefix(http: httpx.Client) -> None:
    body = BODY | {"model": named(http, "qwen3-reranker"), "query": "which city is it, the one of gravity?"}
    http.post("/flush_cache")
    entries = post(http, "/v1/rerank", body)
    cached = sorted(entry["meta_info"]["cached_tokens"] for entry in entries)
    assert cached[0] == 0
    assert cached[1] > 200
    again = post(http, "/v1/rerank", body)
    assert min(entry["meta_info"]["cached_tokens"] for entry in again) > 200
    assert [entry["score"] for entry in again] == pytest.approx([entry["score"] for entry in entries], abs=1e-4)
    assert all(0 < entry["score"] < 1 for entry in again), "p(yes)"
    salted = post(http, "/v1/rerank", body | {"cache_salt": "mine", "documents": DOCUMENTS[:1]})
    assert salted[0]["meta_info"]["cached_tokens"] == 0


def test_an_instruction_changes_the_score(http: httpx.Client) -> None:
    body = BODY | {"model": named(http, "qwen3-reranker")}
    instructed = body | {"instruct": "rank documents about physics first"}
    usual, told = (
        {entry["index"]: entry["score"] for entry in post(http, "/v1/rerank", one)} for one in (body, instructed)
    )
    assert max(abs(usual[index] - told[index]) for index in usual) > 1e-4, "more than the noise of batching"


# -- refusals --------------------------------------------------------------------------------

EMBEDDING = (
    "This model does not appear to be an embedding model by default. "
    "Please add `--is-embedding` when launching the server or try another model."
)


def test_a_model_of_another_task(http: httpx.Client) -> None:
    for path, body in (("/v1/rerank", BODY), ("/score", {"text_1": "a", "text_2": "b"})):
        answer = http.post(path, json=body | {"model": named(http, "llama")})
        assert answer.status_code == 400
        message = answer.json()["message"]
        assert answer.json() == {
            "object": "error",
            "message": message,
            "type": "BadRequestError",
            "param": "model",
            "code": 400,
        }
        assert message.startswith(EMBEDDING)
        assert "`--task rerank`" in message


@pytest.mark.parametrize(
    ("path", "body", "kind", "message"),
    [
        ("/v1/rerank", {"documents": ["a"]}, "Bad Request", "query"),
        ("/v1/rerank", {"query": "a"}, "Bad Request", "documents"),
        ("/v1/rerank", {"query": "a", "documents": [5]}, "Bad Request", "documents"),
        ("/v1/rerank", {"query": "a", "documents": "text"}, "Bad Request", "documents"),
        ("/v1/rerank", {"query": 5, "documents": ["a"]}, "Bad Request", "query"),
        ("/v1/rerank", {"query": "", "documents": ["a"]}, "", "Query cannot be empty"),
        ("/v1/rerank", {"query": " \n", "documents": ["a"]}, "", "Query cannot be empty or whitespace only"),
        ("/v1/rerank", {"query": "a", "documents": []}, "", "Documents cannot be empty"),
        ("/v1/rerank", {"query": "a", "documents": ["a", ""]}, "", "Each document must be a non-empty string"),
        ("/v1/rerank", {"query": "a", "documents": [" "]}, "", "Each document cannot be empty or whitespace only"),
        ("/rerank", {"query": "a", "texts": []}, "", "texts cannot be empty"),
        ("/rerank", {"query": "a", "texts": ["a"], "documents": ["a"]}, "", "at the same time"),
        ("/v1/rerank", BODY | {"top_n": 0}, "", "top_n must be at least 1, got 0."),
        ("/v1/rerank", BODY | {"top_n": 1e30}, "Bad Request", "top_n"),
        ("/v1/rerank", BODY | {"truncate": "middle"}, "Bad Request", "truncate"),
        ("/v1/rerank", BODY | {"max_chunks_per_doc": 1001}, "", "max_chunks_per_doc must be at most 1000"),
        ("/v2/rerank", BODY | {"max_tokens_per_doc": -1}, "", "max_tokens_per_doc must be at least 1, got -1."),
        ("/v2/rerank", BODY | {"relevant_spans": {}}, "", "relevant_spans is not supported"),
        ("/v2/rerank", {"query": "a", "documents": [{"title": "x"}]}, "", "documents[0] has none of the fields text"),
        ("/v1/rerank", BODY | {"instruct": "be kind"}, "", "takes no instruction"),
        ("/v1/rerank", {"query": "a", "documents": ["a"] * 1025}, "", "raise --max-batch-size"),
        ("/v1/rerank", {"query": "paris " * 2000, "documents": ["a"]}, "", "The query leaves no room"),
        ("/score", {"text_1": "a"}, "Bad Request", "text_2"),
        ("/score", {"query": "a"}, "Bad Request", "items"),
        ("/score", {"text_1": ["a", "b"], "text_2": ["a"]}, "", "text_1 has 2 texts and text_2 1"),
        ("/score", {"text_1": "a", "text_2": []}, "", "text_1 has 0 texts"),
        ("/score", {"text_1": "a", "text_2": "b", "query": "c"}, "", "not both"),
        ("/score", {"text_1": "a", "text_2": "b", "item_first": True}, "", "item_first belongs to query and items"),
        ("/score", {"query": "a", "items": ["b"], "apply_softmax": True}, "", "apply_softmax needs label_token_ids"),
        ("/score", {"query": "a", "items": ["b"], "label_token_ids": [1]}, "", "leave label_token_ids out"),
        ("/score", {"query": [1], "items": [[2]]}, "", "must be text"),
        ("/score", {"query": "a", "items": []}, "", "items cannot be empty"),
    ],
)
def test_bad_requests(http: httpx.Client, path: str, body: dict[str, Any], kind: str, message: str) -> None:
    answer = http.post(path, json=body)
    assert answer.status_code == 400, answer.text
    error = answer.json()
    assert (error["object"], error["type"], error["code"]) == ("error", kind or "BadRequestError", 400)
    assert message in error["message"]


LONG = "paris " * 2000


@pytest.mark.field
@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/rerank", {"query": " ", "documents": ["a"]}, "query"),
        ("/v1/rerank", {"query": LONG * 9, "documents": ["a"]}, "query"),
        ("/v1/rerank", {"query": "a", "documents": ["a", LONG]}, "documents[1]"),
        ("/v2/rerank", {"query": "a", "documents": ["a", " "]}, "documents[1]"),
        ("/rerank", {"query": "a", "texts": ["a", LONG]}, "texts[1]"),
        ("/rerank", {"query": "a", "texts": ["a", ""]}, "texts[1]"),
        ("/rerank", {"query": "a", "texts": ["a"] * 1025}, "texts"),
        ("/score", {"text_1": "a", "text_2": ["b", LONG]}, "text_2[1]"),
        ("/score", {"text_1": "a", "text_2": LONG}, "text_2"),
        ("/score", {"text_1": ["a", LONG * 9], "text_2": ["a", "b"]}, "text_1[1]"),
        ("/score", {"text_1": ["a", " "], "text_2": ["a", "b"]}, "text_1[1]"),
        ("/score", {"text_1": "", "text_2": ["a", "b"]}, "text_1"),
        ("/score", {"text_1": "a", "text_2": ["b"] * 1025}, "text_2"),
        ("/score", {"query": "a", "items": ["b", ""]}, "items[1]"),
        ("/score", {"query": "a", "items": ["b", LONG]}, "items[1]"),
        ("/score", {"query": "a", "items": ["b", LONG * 9], "item_first": True}, "items[1]"),
        ("/score", {"query": " ", "items": ["b"], "item_first": True}, "query"),
        ("/score", {"query": "a", "items": ["b"] * 1025, "item_first": True}, "items"),
    ],
)
def test_errors_name_the_field_as_the_client_spelled_it(
    http: httpx.Client, path: str, body: dict[str, Any], param: str
) -> None:
    answer = http.post(path, json=body)
    assert answer.status_code == 400
    assert answer.json()["param"] == param
    if path != "/v2/rerank":  # SGLang's words for its own fields
        assert answer.json()["message"].startswith(
            param if "[" in param else ("The input", "Query", "The query", param)
        )


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"label_token_ids": None}, "label_token_ids is required for generation (CausalLM) models."),
        ({"label_token_ids": []}, "label_token_ids must be provided"),
        ({"label_token_ids": [5, 100000]}, "Token ID 100000 is out of vocabulary (vocab size: "),
        ({"label_token_ids": [-1]}, "Token ID -1 is out of vocabulary"),
        ({"items": ["b", ""]}, "items[1]: items must not be empty."),
        ({"items": ["b", [5]]}, "every item must be text"),
        ({"items": [5, [5]]}, "items mixes"),
        ({"query": [5], "items": ["b"]}, "every item must be one"),
        ({"query": [5], "items": [[5], [100000]]}, "items[1]: The items contains values greater than the vocab"),
        ({"query": [5], "items": [[5], []]}, "items[1]: items must not be empty."),
        ({"query": ""}, "query cannot be empty"),
        ({"items": []}, "items cannot be empty"),
        ({"items": ["b", "to be " * 2000]}, "items[1]: The input ("),
        ({"use_activation": False}, "use_activation doesn't apply to label_token_ids"),
    ],
)
def test_bad_label_requests(http: httpx.Client, more: dict[str, Any], message: str) -> None:
    body = {"query": "a", "items": ["b"], "label_token_ids": [5], "model": named(http, "qwen3-reranker")}
    answer = http.post("/v1/score", json=body | more)
    assert answer.status_code == 400, answer.text
    assert message in answer.json()["message"]
