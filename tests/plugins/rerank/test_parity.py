"""Scores are those of transformers' own forward on the same weights, whatever shares the batch."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from trunkline.core import Engine
from trunkline.core.errors import RequestError
from trunkline.plugins.rerank.offline import rerank
from trunkline.plugins.rerank.prompts import INSTRUCT, JUDGE

QUERY = "what is the capital of china?"
DOCUMENTS = [
    "the capital of china is beijing.",
    "gravity is a force: it attracts two bodies",
    "paris",
    "the capital of france is paris, a city in france. " * 3,
]
CROSS_ENCODERS = ["bert", "distilbert", "roberta", "xlmr", "modernbert-cls", "modernbert-mean", "deberta", "mpnet"]
TOLERANCE = 1e-4
NOUNS = ["capital", "france", "china", "paris", "beijing", "gravity", "force", "is", "in", "what"]  # one token each


@pytest.fixture
def engine(reranker: Callable[[str], Path]) -> Iterator[Callable[..., Engine]]:
    """``engine("bert")``: it serves that checkpoint alone."""
    engines: list[Engine] = []

    def start(name: str, **options: Any) -> Engine:
        engines.append(Engine(str(reranker(name)), dtype="float32", **options))
        return engines[-1]

    yield start
    for one in engines:
        one.close()


def own_logits(folder: Path, inputs: Sequence[Any]) -> list[torch.Tensor]:
    """What the class itself says about each input alone."""
    config = transformers.AutoConfig.from_pretrained(folder)
    cls = getattr(transformers, config.architectures[0])
    model = cls.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.inference_mode():
        return [model(**one).logits[0] for one in inputs]


def by_index(records: list[dict[str, Any]], field: str = "logit") -> list[Any]:
    return [record[field] for record in sorted(records, key=lambda record: int(record["index"]))]


@pytest.mark.parametrize("name", CROSS_ENCODERS)
def test_cross_encoders(name: str, engine: Callable[..., Engine], reranker: Callable[[str], Path]) -> None:
    records = rerank(engine(name), QUERY, DOCUMENTS, timeout=60)
    tokenizer = AutoTokenizer.from_pretrained(reranker(name))
    inputs = [tokenizer(QUERY, document, return_tensors="pt") for document in DOCUMENTS]
    own = [float(logits[0]) for logits in own_logits(reranker(name), inputs)]
    assert by_index(records) == pytest.approx(own, abs=TOLERANCE)
    assert max(own) - min(own) > 50 * TOLERANCE, "scores that hardly differ prove nothing"
    assert by_index(records, "prompt_tokens") == [one["input_ids"].shape[1] for one in inputs]
    assert [record["index"] for record in records] == sorted(range(len(own)), key=lambda index: -own[index])
    assert by_index(records, "score") == by_index(records), "no activation unless the checkpoint asks for one"


def test_token_types_matter_to_bert(engine: Callable[..., Engine], reranker: Callable[[str], Path]) -> None:
    """The test above could not tell if they didn't."""
    tokenizer = AutoTokenizer.from_pretrained(reranker("bert"))
    typed = tokenizer(QUERY, DOCUMENTS[0], return_tensors="pt")
    untyped = dict(typed) | {"token_type_ids": torch.zeros_like(typed["token_type_ids"])}
    with_types, without = own_logits(reranker("bert"), [typed, untyped])
    assert abs(float(with_types[0] - without[0])) > 30 * TOLERANCE


def test_the_activation_that_the_checkpoint_asks_for(engine: Callable[..., Engine]) -> None:
    records = rerank(engine("bert-sigmoid"), QUERY, DOCUMENTS, timeout=60)
    logits = torch.tensor(by_index(records), dtype=torch.float64)
    assert by_index(records, "score") == pytest.approx(logits.sigmoid().tolist(), abs=1e-9)


def card(tokenizer: Any, query: str, document: str, instruct: str = INSTRUCT) -> list[int]:
    """Token ids as the model card of Qwen3-Reranker makes them: prefix, pair and suffix one by one."""
    prefix = f"<|im_start|>system\n{JUDGE}<|im_end|>\n<|im_start|>user\n"
    suffix = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    pair = f"<Instruct>: {instruct}\n<Query>: {query}\n<Document>: {document}"
    texts = (prefix, pair, suffix)
    return [token for text in texts for token in tokenizer.encode(text, add_special_tokens=False)]


def p_yes(folder: Path, prompts: Sequence[list[int]]) -> list[float]:
    """The model card's score: softmax over the last logits of "no" and "yes"."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    words = [tokenizer.convert_tokens_to_ids(word) for word in ("no", "yes")]
    own = own_logits(folder, [{"input_ids": torch.tensor([ids])} for ids in prompts])
    return [float(torch.log_softmax(logits[-1, words].double(), 0)[1].exp()) for logits in own]


@pytest.mark.parametrize("name", ["qwen3-reranker", "gemma2-reranker"])
@pytest.mark.parametrize("options", [{}, {"disable_radix_cache": True}, {"chunked_prefill_size": 48}])
def test_causal_rerankers_score_as_the_model_card_does(
    name: str, options: dict[str, Any], engine: Callable[..., Engine], reranker: Callable[[str], Path]
) -> None:
    """Gemma 2 caps its logits: found by the head, not by the card."""
    started = engine(name, **options)
    assert "rerank" in started.served().tasks, "recognised by its name"
    records = rerank(started, QUERY, DOCUMENTS, timeout=60)
    tokenizer = AutoTokenizer.from_pretrained(reranker(name))
    prompts = [card(tokenizer, QUERY, document) for document in DOCUMENTS]
    assert by_index(records, "score") == pytest.approx(p_yes(reranker(name), prompts), abs=TOLERANCE)
    assert by_index(records, "prompt_tokens") == [len(ids) for ids in prompts]
    shared = next(at for at, tokens in enumerate(zip(*prompts, strict=False)) if len(set(tokens)) > 1)
    cached = by_index(records, "cached_tokens")
    if options.get("disable_radix_cache"):
        assert cached == [0] * len(DOCUMENTS)
    else:
        assert sorted(cached)[1] == shared > 200, "the instruction and the query are computed once"


def test_an_instruction_takes_the_default_ones_place(
    engine: Callable[..., Engine], reranker: Callable[[str], Path]
) -> None:
    folder, instruct = reranker("qwen3-reranker"), "find what explains ⟦query⟧ ⟦document⟧"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    wanted = p_yes(folder, [card(tokenizer, QUERY, DOCUMENTS[1], instruct)])
    started = engine("qwen3-reranker")
    [asked] = rerank(started, QUERY, DOCUMENTS[1:2], instruct=instruct, timeout=60)
    other = engine("qwen3-reranker", rerank_instruct=instruct)
    [configured] = rerank(other, QUERY, DOCUMENTS[1:2], timeout=60)
    assert [asked["score"], configured["score"]] == pytest.approx(wanted * 2, abs=TOLERANCE)


def test_converted_causal_rerankers(engine: Callable[..., Engine], reranker: Callable[[str], Path]) -> None:
    """A …ForSequenceClassification with a reranker's chat template gets its prompt, and its logit is the score."""
    folder = reranker("qwen3-reranker-seqcls")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = [{"input_ids": torch.tensor([card(tokenizer, QUERY, document)])} for document in DOCUMENTS]
    own = [float(logits[0]) for logits in own_logits(folder, inputs)]
    records = rerank(engine("qwen3-reranker-seqcls"), QUERY, DOCUMENTS, timeout=60)
    assert by_index(records) == pytest.approx(own, abs=TOLERANCE)


def test_pairs_without_a_prompt(engine: Callable[..., Engine], reranker: Callable[[str], Path]) -> None:
    """``--rerank-prompt pair``: what the tokenizer makes of two texts, also for a causal model."""
    folder = reranker("llama-reward")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    own = own_logits(folder, [tokenizer(QUERY, document, return_tensors="pt") for document in DOCUMENTS])
    started = engine("llama-reward", task=("rerank",), rerank_prompt="pair")
    records = rerank(started, QUERY, DOCUMENTS, timeout=60)
    assert by_index(records) == pytest.approx([float(logits[0]) for logits in own], abs=TOLERANCE)


@pytest.mark.parametrize(("how", "kept"), [("end", "first"), ("start", "last")])
@pytest.mark.parametrize("name", ["bert", "qwen3-reranker"])
def test_only_the_document_is_truncated(
    name: str, how: str, kept: str, engine: Callable[..., Engine], reranker: Callable[[str], Path]
) -> None:
    started, tokenizer = engine(name), AutoTokenizer.from_pretrained(reranker(name))
    limit = started.served().max_request_tokens
    words = "in the city of paris " * limit
    with pytest.raises(RequestError, match=r"^documents\[1\]: The input \(\d+ tokens\) is longer than"):
        rerank(started, QUERY, ["paris", words[: 8 * limit]], timeout=60)
    short, long = rerank(started, QUERY, ["paris", words[: 8 * limit]], truncate=how, timeout=60)
    if long["index"] == 0:
        short, long = long, short
    assert "truncated" not in short
    assert (long["truncated"], long["prompt_tokens"]) == (True, limit)
    assert long["original_tokens"] > limit
    if name == "bert":
        whole = tokenizer(QUERY, words[: 8 * limit])
        first = whole["token_type_ids"].index(1)
        document, room = whole["input_ids"][first:-1], limit - first - 1
        part = document[:room] if kept == "first" else document[-room:]
        ids = [*whole["input_ids"][:first], *part, whole["input_ids"][-1]]
        types = [0] * first + [1] * (limit - first)
        [own] = own_logits(
            reranker(name), [{"input_ids": torch.tensor([ids]), "token_type_ids": torch.tensor([types])}]
        )
        assert long["logit"] == pytest.approx(float(own[0]), abs=TOLERANCE)


def test_a_query_that_fills_the_context_is_refused(engine: Callable[..., Engine]) -> None:
    started = engine("bert")
    with pytest.raises(RequestError, match=r"^The query leaves no room for a document"):
        rerank(started, "paris " * started.served().max_request_tokens, ["paris"], truncate="end", timeout=60)
    with pytest.raises(RequestError, match=r"takes no instruction"):
        rerank(started, QUERY, ["paris"], instruct="be kind", timeout=60)


def test_a_model_that_does_not_rerank(engine: Callable[..., Engine]) -> None:
    started = engine("llama")
    with pytest.raises(RequestError, match=r"does not appear to be an embedding model.*`--task rerank`"):
        rerank(started, QUERY, DOCUMENTS, timeout=60)


@pytest.mark.field
def test_ninety_documents_get_ninety_scores(
    engine: Callable[..., Engine], reranker: Callable[[str], Path], tmp_path: Path
) -> None:
    """Logits near 8 have steps of 1/16 in bfloat16, the default dtype of many CPUs; the scores are float32."""
    folder = tmp_path / "level"
    shutil.copytree(reranker("bert"), folder)
    tensors = load_file(folder / "model.safetensors")
    tensors |= {"classifier.bias": torch.tensor([8.0]), "classifier.weight": tensors["classifier.weight"] * 0.1}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    documents = [f"{first} {second}" for first in NOUNS for second in (*NOUNS[:7], *["the", "of"])]
    assert len(documents) == 90
    with Engine(str(folder), dtype="bfloat16", threads=1) as served:
        rows = watch_score_rows(served)
        records = [rerank(served, QUERY, [document], timeout=60)[0] for document in documents]
    body = transformers.AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = [float(body.classifier(body.bert.pooler(row.float()[:, None]))) for row in rows]
    logits = [record["logit"] for record in records]
    assert logits == pytest.approx(expected, abs=1e-6)
    assert len(set(logits)) == 90
    assert len({float(torch.tensor(logit).bfloat16()) for logit in logits}) < 30
    assert sorted(range(90), key=lambda i: -logits[i]) == sorted(range(90), key=lambda i: -expected[i])


def watch_score_rows(engine: Engine) -> list[torch.Tensor]:
    """The rows that the score head gets from now on."""
    (lane,) = engine.client.transport.loop.lanes
    head = lane.model.heads["score"]
    rows: list[torch.Tensor] = []

    def note(hidden: torch.Tensor) -> torch.Tensor:
        rows.append(hidden.clone())
        return head(hidden)

    lane.model.heads["score"] = note
    return rows
