"""Several tasks of one model, several models in one server, and the task that a model doesn't serve."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from trunkline.core import Engine
from trunkline.core.engine.scheduling.batch import Batch
from trunkline.core.errors import ModelError, RequestError
from trunkline.core.model.sources import catalogue
from trunkline.plugins.embedding.offline import encode
from trunkline.plugins.embedding.schemas import EmbeddingParams
from trunkline.plugins.generation.offline import generate
from trunkline.plugins.generation.schemas import GenerationParams
from trunkline.plugins.reward.offline import classify

PROMPT = list(range(10, 50))
OTHER = list(range(60, 100))
GREEDY = {"temperature": 0, "max_new_tokens": 4, "ignore_eos": True}
LONG = "the sea and the other there " * 300
NOT_EMBEDDING = (
    "This model does not appear to be an embedding model by default. "
    "Please add `--is-embedding` when launching the server or try another model."
)


# -- one backbone, several tasks -------------------------------------------------------------


@pytest.fixture
def both(zoo: Callable[[str], Path]) -> Iterator[Engine]:
    """A causal model that generates and embeds."""
    with Engine(
        str(zoo("llama")), task=("generation", "embedding"), dtype="float32", chunked_prefill_size=16, threads=1
    ) as engine:
        yield engine


def watch(engine: Engine) -> list[Batch]:
    """The batches that run from now on."""
    (lane,) = engine.client.transport.loop.lanes
    batches: list[Batch] = []
    plan = lane.scheduler.plan

    def watched(**options: Any) -> Batch | None:
        batch = plan(**options)
        if batch is not None:
            batches.append(batch)
        return batch

    lane.scheduler.plan = watched  # type: ignore[method-assign]
    return batches


def generation(tokens: int) -> GenerationParams:
    return GenerationParams(max_new_tokens=tokens, temperature=0.0, ignore_eos=True)


def test_tasks_share_batches_and_do_not_change_each_other(both: Engine) -> None:
    alone = both.submit("generation", PROMPT, generation(24)).result(60).tokens
    [vector] = encode(both, [OTHER])
    assert both.call("flush_cache")
    batches = watch(both)
    running = both.submit("generation", PROMPT, generation(24))
    vectors = encode(both, [OTHER, PROMPT, OTHER[:20]])
    assert running.result(60).tokens == alone
    np.testing.assert_allclose(vectors[0], vector, atol=1e-5)
    mixed = [batch for batch in batches if len({row.request.task for row in batch.rows}) == 2]
    assert mixed, "no batch held rows of both tasks"


def test_tasks_share_one_tree(both: Engine) -> None:
    """What one task computed the other finds, in either direction."""
    both.submit("generation", PROMPT, generation(2)).result(60)
    embedded = both.submit("embedding", PROMPT, EmbeddingParams()).result(60)
    assert embedded.cached_tokens == len(PROMPT) - 1
    both.submit("embedding", OTHER, EmbeddingParams()).result(60)
    generated = both.submit("generation", OTHER, generation(2)).result(60)
    assert generated.cached_tokens == len(OTHER) - 1


def test_one_server_answers_for_both_tasks(workbench: Any) -> None:
    with httpx.Client(base_url=workbench.url, timeout=60) as http:
        assert http.post("/flush_cache?timeout=20").status_code == 200
        vector = http.post("/encode", json={"input_ids": PROMPT}).json()["embedding"]
        assert len(vector) == 128
        assert sum(value * value for value in vector) == pytest.approx(1, abs=1e-4)
        answer = http.post("/generate", json={"input_ids": PROMPT, "sampling_params": GREEDY}).json()
        assert len(answer["output_ids"]) == 4
        assert answer["meta_info"]["cached_tokens"] == len(PROMPT) - 1
        again = http.post("/encode", json={"input_ids": PROMPT}).json()["embedding"]
        assert again == pytest.approx(vector, abs=1e-5)
        info = http.get("/model_info").json()
        assert set(info["tasks"]) == {"generation", "embedding"}
        assert info["is_generation"] is True


@pytest.mark.field
def test_functions_for_python_choose_the_model_that_serves_their_task(zoo: Callable[[str], Path]) -> None:
    folders = [str(zoo("bert")), str(zoo("llama"))]
    with Engine(*folders, dtype="float32", threads=1) as engine:
        [record] = generate(engine, ["hello"], **GREEDY)
        assert len(record["output_ids"]) == 4
        np.testing.assert_array_equal(encode(engine, ["hello"]), encode(engine, ["hello"], model=folders[0]))
        with pytest.raises(RequestError, match=r"^No loaded model serves reward\. "):
            classify(engine, ["hello"])
        with pytest.raises(RequestError, match="no model named 'gpt-4o'"):
            generate(engine, ["hello"], model="gpt-4o")


# -- several models in one server ------------------------------------------------------------


@pytest.fixture
def port(fleet: Any) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=fleet.url, timeout=60) as http:
        yield http


def test_the_two_demo_models_on_one_port(live: Callable[..., Any]) -> None:
    """The README's command."""
    names = ["demo:smollm2-135m-instruct", "demo:all-minilm-l6-v2"]
    try:
        for name in names:
            catalogue.fetch(name)
    except ModelError as error:
        pytest.skip(f"{name} isn't here: {error}")
    server = live(*names)
    with httpx.Client(base_url=server.url, timeout=120) as http:
        body = {"text": "1, 2, 3, 4, 5, 6, 7,", "sampling_params": {"temperature": 0, "max_new_tokens": 24}}
        assert http.post("/generate", json=body).json()["text"] == " 8, 9, 10, 11, 12, 13, 1"
        assert len(http.post("/encode", json={"text": "A man is eating."}).json()["embedding"]) == 384
        cards = http.get("/v1/models").json()["data"]
        assert [card["id"] for card in cards] == names
        for path in ("/get_model_info", "/model_info", "/get_server_info", "/server_info"):
            for name in names:
                info = http.get(path, params={"model": name}).json()
                assert (info["model_path"], info["tokenizer_path"]) == (name, str(catalogue.fetch(name)))


def test_every_task_is_answered_on_one_port(port: httpx.Client) -> None:
    text = "hello there"
    generated = port.post("/generate", json={"text": text, "sampling_params": GREEDY})
    assert generated.json()["meta_info"]["completion_tokens"] == 4
    assert len(port.post("/encode", json={"text": text}).json()["embedding"]) == 128
    ranked = port.post("/v1/rerank", json={"query": text, "documents": ["the sea", "hello"]}).json()
    assert sorted(entry["index"] for entry in ranked) == [0, 1]
    assert len(port.post("/classify", json={"text": text}).json()["embedding"]) == 1  # the first that classifies: ranks
    named = port.post("/v1/classify", json={"input": text, "model": "labels"}).json()
    assert named["model"] == "labels"
    assert named["data"][0]["label"] in ("negative", "neutral", "positive")


def test_all_models_are_listed_and_have_their_memory(port: httpx.Client, fleet: Any) -> None:
    cards = port.get("/v1/models").json()["data"]
    assert [card["id"] for card in cards] == ["talks", "embeds", "ranks", "labels"]
    log = fleet.log.read_text()
    for name in ("talks", "labels"):
        assert re.search(rf" {name}: weights [\d.]+ [KM]iB, KV pool [\d.]+ [MG]iB for \d+ tokens", log), log
    for name in ("embeds", "ranks"):
        assert re.search(rf" {name}: weights [\d.]+ [KM]iB, no KV pool, up to \d+ tokens per pass", log), log
    for name in ("talks", "labels"):
        assert port.get("/get_server_info", params={"model": name}).json()["max_total_num_tokens"] > 0


REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    # path -> (the only model, or the first, that serves it, the request)
    "/generate": ("talks", {"text": "a", "sampling_params": GREEDY}),
    "/v1/completions": ("talks", {"prompt": "a", "max_tokens": 1}),
    "/v1/chat/completions": ("talks", {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1}),
    "/encode": ("embeds", {"text": "a"}),
    "/v1/embeddings": ("embeds", {"input": "a"}),
    "/embed": ("embeds", {"inputs": "a"}),
    "/v1/rerank": ("ranks", {"query": "a", "documents": ["b"]}),
    "/v2/rerank": ("ranks", {"query": "a", "documents": ["b"]}),
    "/rerank": ("ranks", {"query": "a", "texts": ["b"]}),
    "/score": ("ranks", {"text_1": "a", "text_2": "b"}),
    "/classify": ("ranks", {"text": "a"}),
    "/v1/classify": ("ranks", {"input": "a"}),
}


@pytest.mark.field
@pytest.mark.parametrize("path", REQUESTS)
def test_a_request_without_a_real_model_name_goes_to_the_first_that_serves_it(port: httpx.Client, path: str) -> None:
    expected, body = REQUESTS[path]
    for name in (None, "", "default", "unknown", "dummy"):
        answer = port.post(path, json=body | {"model": name})
        assert answer.status_code == 200, answer.text
    named = port.post(path, json=body | {"model": expected})
    if path == "/v1/classify":
        assert answer.json()["model"] == named.json()["model"] == expected


@pytest.mark.field
@pytest.mark.parametrize("path", REQUESTS)
def test_another_unknown_name_is_the_only_model_that_serves_the_task(port: httpx.Client, path: str) -> None:
    answer = port.post(path, json=REQUESTS[path][1] | {"model": "gpt-4o"})
    if "classify" not in path:
        assert answer.status_code == 200, answer.text
        return
    assert answer.status_code == (404 if path.startswith("/v1") else 400)
    assert answer.json()["error"]["message"] == "The model 'gpt-4o' does not exist; there are: ranks, labels."


@pytest.mark.field
def test_a_task_that_no_loaded_model_serves_is_blamed_on_none_of_them(
    zoo: Callable[[str], Path], live: Callable[..., Any]
) -> None:
    server = live(str(zoo("bert")), "--served-model-name", "one", str(zoo("bert-labels")), "--served-model-name", "two")
    with httpx.Client(base_url=server.url, timeout=60) as http:
        answer = http.post("/v1/rerank", json={"query": "a", "documents": ["b"]})
        assert answer.status_code == 400
        assert answer.json()["message"].startswith("No loaded model serves rerank. one: BertModel is not a ")
        assert " two: BertForSequenceClassification is not a " in answer.json()["message"]


@pytest.mark.parametrize(
    ("path", "body", "model", "reason"),
    [
        ("/encode", {"text": "a"}, "talks", NOT_EMBEDDING),
        ("/classify", {"text": "a"}, "talks", NOT_EMBEDDING),
        ("/generate", {"text": "a"}, "embeds", "has no language model head"),
        ("/classify", {"text": "a"}, "embeds", "/encode"),
        ("/encode", {"text": "a"}, "labels", "/classify"),
        ("/generate", {"text": "a"}, "labels", "has no language model head"),
    ],
)
def test_the_wrong_task_says_what_would_work(
    port: httpx.Client, path: str, body: dict[str, Any], model: str, reason: str
) -> None:
    answer = port.post(path, json=body | {"model": model})
    assert answer.status_code == 400
    message = answer.json()["error"]["message"]
    assert reason in message
    if reason == NOT_EMBEDDING:
        assert message.startswith(reason)


def test_the_wrong_task_in_openais_dialect(port: httpx.Client) -> None:
    for path, body in (("/v1/rerank", {"query": "a", "documents": ["b"]}), ("/v1/classify", {"input": "a"})):
        answer = port.post(path, json=body | {"model": "talks"})
        assert (answer.status_code, answer.json()["object"]) == (400, "error")
        assert "--is-embedding" in answer.json()["message"]


def test_a_bad_item_fails_its_batch_but_nobody_else(port: httpx.Client) -> None:
    refused = port.post("/encode", json={"text": ["short", LONG]})
    assert refused.status_code == 400
    assert refused.json()["error"]["message"].startswith("text[1]: The input (")
    cut = port.post("/encode", json={"text": ["short", LONG], "truncate": "end"}).json()
    assert "truncated" not in cut[0]["meta_info"]
    assert cut[1]["meta_info"]["truncated"] is True
    assert cut[1]["meta_info"]["original_tokens"] > cut[1]["meta_info"]["prompt_tokens"]
