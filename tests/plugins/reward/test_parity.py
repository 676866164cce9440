"""Scores of tiny checkpoints against transformers: alone, in a batch, in chunks, over a cached prefix."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from trunkline.core import Engine
from trunkline.core.errors import RequestError
from trunkline.plugins.reward.offline import classify

CAUSAL = ("llama-score", "qwen2-labels", "qwen3-score", "gemma2-score", "mixtral-score")
ENCODERS = ("bert-labels", "bert-multilabel", "distilbert-labels", "modernbert-mean-score", "deberta-labels")
CHUNK = 16  # tokens
PROMPT = "the sea and the other there is nothing else to see in it; "
TEXTS = ["hello", PROMPT + "yes", PROMPT * 6 + "no", PROMPT * 6 + "it is not so"]
TOLERANCE = 1e-4


def expected(folder: Path, texts: list[Any]) -> list[torch.Tensor]:
    """The class's own scores of each text alone."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    scores = []
    for text in texts:
        joined = tokenizer(*([text] if isinstance(text, str) else text), return_tensors="pt")
        with torch.no_grad():
            scores.append(model(**joined).logits[0])
    return scores


def compare(records: list[dict[str, Any]], wanted: list[torch.Tensor]) -> None:
    for record, scores in zip(records, wanted, strict=True):
        torch.testing.assert_close(torch.tensor(record["scores"]), scores, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", CAUSAL)
def test_reward_models(zoo: Callable[[str], Path], name: str) -> None:
    folder = zoo(name)
    wanted = expected(folder, TEXTS)
    assert max(float((one - other).abs().max()) for one in wanted for other in wanted) > 0.05  # they tell texts apart
    with Engine(str(folder), dtype="float32", chunked_prefill_size=CHUNK) as engine:
        batched = classify(engine, TEXTS)
        compare(batched, wanted)
        assert max(record["prompt_tokens"] for record in batched) > 4 * CHUNK
        assert batched[3]["cached_tokens"] > 0  # it shares a prefix with its neighbour, computed once
        for text, scores in zip(TEXTS, wanted, strict=True):
            [alone] = classify(engine, [text])
            compare([alone], [scores])
            assert alone["cached_tokens"] == alone["prompt_tokens"] - 1


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders(zoo: Callable[[str], Path], name: str) -> None:
    folder = zoo(name)
    texts = [*TEXTS, ["hello there", "the sea"]]
    wanted = expected(folder, texts)
    with Engine(str(folder), dtype="float32") as engine:
        compare(classify(engine, texts), wanted)
        for text, scores in zip(texts, wanted, strict=True):
            [alone] = classify(engine, [text])
            compare([alone], [scores])
            assert alone["cached_tokens"] == 0


def test_without_a_cache(zoo: Callable[[str], Path]) -> None:
    folder = zoo("llama-score")
    with Engine(str(folder), dtype="float32", disable_radix_cache=True) as engine:
        for _ in range(2):
            records = classify(engine, TEXTS)
            compare(records, expected(folder, TEXTS))
            assert {record["cached_tokens"] for record in records} == {0}


def test_token_ids_pairs_labels_and_truncation(zoo: Callable[[str], Path]) -> None:
    folder = zoo("bert-labels")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "hello there"
    with Engine(str(folder), dtype="float32") as engine:
        [by_text] = classify(engine, [text])
        [by_ids] = classify(engine, [tokenizer(text)["input_ids"]])
        assert by_text == by_ids
        assert by_text["label"] == ["negative", "neutral", "positive"][by_text["probs"].index(max(by_text["probs"]))]
        assert sum(by_text["probs"]) == pytest.approx(1)
        long = "the sea of " * 400
        limit = engine.served().max_request_tokens
        cut = tokenizer.decode(tokenizer(long, truncation=True, max_length=limit)["input_ids"][1:-1])
        compare(classify(engine, [long], truncate="end"), expected(folder, [cut]))
        with pytest.raises(RequestError, match=r"^texts\[1\]: The input \(\d+ tokens\) is longer"):
            classify(engine, [text, long])


def test_many_labels_that_do_not_exclude_each_other(zoo: Callable[[str], Path]) -> None:
    with Engine(str(zoo("bert-multilabel")), dtype="float32") as engine:
        [record] = classify(engine, ["hello there"])
    assert record["probs"] == pytest.approx(torch.sigmoid(torch.tensor(record["scores"])).tolist())
    assert sum(record["probs"]) != pytest.approx(1)


@pytest.mark.parametrize("typed", [True, False])
def test_token_types_of_pairs_follow_the_tokenizers_files(
    zoo: Callable[[str], Path], tmp_path: Path, typed: bool
) -> None:
    folders = {}
    for kind, names in ((True, ["input_ids", "token_type_ids"]), (False, ["input_ids"])):
        folders[kind] = tmp_path / str(kind)
        shutil.copytree(zoo("bert-labels"), folders[kind])
        settings = json.loads((folders[kind] / "tokenizer_config.json").read_text())
        settings["model_input_names"] = names
        (folders[kind] / "tokenizer_config.json").write_text(json.dumps(settings))
    pair = ["hello there", "the sea"]
    wanted, other = expected(folders[typed], [pair])[0], expected(folders[not typed], [pair])[0]
    assert float((wanted - other).abs().max()) > 0.01
    with Engine(str(folders[typed]), dtype="float32") as engine:
        compare(classify(engine, [pair, *TEXTS]), [wanted, *expected(folders[typed], TEXTS)])
