"""Which checkpoints rerank, and what the others' clients are told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trunkline.core.types import ModelInfo
from trunkline.plugins import rerank
from trunkline.plugins.rerank.detect import (
    ACTIVATIONS,
    activation_name,
    is_language_model,
    logit_score,
    sigmoid,
    softplus,
)

ONE: dict[str, Any] = {"id2label": {"0": "LABEL_0"}}


def info(architecture: str, path: Path | str = "/models/x", **changes: Any) -> ModelInfo:
    fields: dict[str, Any] = {
        "path": str(path),
        "architecture": architecture,
        "model_type": "",
        "context_length": 8,
        "vocab_size": 8,
        "hidden_size": 8,
        "causal": not architecture.startswith(("Bert", "XLM", "MPNet")),
    }
    return ModelInfo(**fields | changes)


@pytest.mark.parametrize(
    ("model", "when", "reason"),
    [
        (info("BertForSequenceClassification", config=ONE), "default", ""),
        (info("XLMRobertaForSequenceClassification", config={"num_labels": 1}), "default", ""),
        (info("BertForSequenceClassification"), "no", "has 2 labels"),
        (info("BertForSequenceClassification", config={"num_labels": 3}), "no", "has 3 labels"),
        (info("BertModel"), "no", "BertModel is not a cross-encoder model"),
        (info("MPNetForMaskedLM"), "no", "not a cross-encoder model"),
        (info("LlamaForCausalLM"), "on_request", "LlamaForCausalLM is not a cross-encoder model"),
        (info("Qwen3ForCausalLM", "/models/Qwen3-Reranker-0.6B"), "default", ""),
        (info("Qwen3ForCausalLM", "/hub/models--Qwen--Qwen3-Reranker-4B/snapshots/ab12"), "default", ""),
        (info("Qwen3ForCausalLM", "/rerankers/mine/model"), "on_request", "`--task rerank`"),
        (info("Qwen3ForCausalLM", config={"_name_or_path": "x/My-ReRanker"}), "default", ""),
        (info("LlamaForSequenceClassification", config=ONE), "on_request", "`--task rerank`"),
        (info("Qwen3ForSequenceClassification", "/m/reranker", config=ONE), "default", ""),
        (info("Qwen3ForSequenceClassification", "/m/reranker", config={"num_labels": 2}), "no", "2 labels"),
        (
            info("BertForSequenceClassification", config=ONE | {"sbert_ce_default_activation_function": "a.b.Mish"}),
            "no",
            "asks for the activation Mish; known are Identity,",
        ),
    ],
)
def test_who_serves(model: ModelInfo, when: str, reason: str) -> None:
    answer = rerank.trunkline_serves(model)
    assert (answer.task, answer.when) == ("rerank", when)
    assert reason in answer.reason
    assert bool(answer.reason) == (when != "default")
    language = is_language_model(model) and when == "on_request"
    assert answer.detail.startswith("To have it rerank by answering yes or no") == language


@pytest.mark.parametrize(
    ("file", "content", "found"),
    [
        ("README.md", "---\nlicense: mit\npipeline_tag: text-ranking\n---\n# A model", True),
        ("README.md", "---\npipeline_tag: text-generation\n---\n" + " " * 5000 + "pipeline_tag: text-ranking", False),
        ("chat_template.jinja", "{% for m in messages if m.role == 'query' or m.role == 'document' %}", True),
        ("chat_template.jinja", "<Query>: {{ q }} <Document>: {{ d }}", True),
        ("chat_template.jinja", "{% for document in documents %}", False),
        ("tokenizer_config.json", json.dumps({"chat_template": '"query" "document"'}), True),
        ("tokenizer_config.json", "not json", False),
    ],
)
def test_files_give_a_causal_reranker_away(tmp_path: Path, file: str, content: str, found: bool) -> None:
    (tmp_path / file).write_text(content)
    assert rerank.trunkline_serves(info("Qwen3ForCausalLM", tmp_path)).when == ("default" if found else "on_request")


def sentence_transformers(folder: Path, score: dict[str, Any]) -> Path:
    """A folder as sentence-transformers saves a causal cross-encoder."""
    (folder / "1_LogitScore").mkdir()
    (folder / "1_LogitScore" / "config.json").write_text(json.dumps(score))
    kind = "sentence_transformers.cross_encoder.modules.logit_score.LogitScore"
    modules = [{"idx": 0, "path": "", "type": "x.Transformer"}, {"idx": 1, "path": "1_LogitScore", "type": kind}]
    (folder / "modules.json").write_text(json.dumps(modules))
    return folder


@pytest.mark.parametrize("irrelevant", [7, None])
def test_sentence_transformers_answer_tokens(tmp_path: Path, irrelevant: int | None) -> None:
    folder = sentence_transformers(tmp_path, {"true_token_id": 5, "false_token_id": irrelevant})
    assert logit_score(folder) == (5, irrelevant)
    assert rerank.trunkline_serves(info("LlamaForCausalLM", folder)).when == "default"


def test_no_answer_tokens(tmp_path: Path) -> None:
    assert logit_score(tmp_path) is None
    assert logit_score(sentence_transformers(tmp_path, {"true_token_id": "yes"})) is None


def test_activations_are_where_each_generation_of_files_has_them(tmp_path: Path) -> None:
    name = "torch.nn.modules.activation.Sigmoid"
    assert activation_name(info("B")) == "Identity"
    assert activation_name(info("B", config={"sentence_transformers": {"activation_fn": name}})) == "Sigmoid"
    assert activation_name(info("B", config={"sbert_ce_default_activation_function": name})) == "Sigmoid"
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps({"activation_fn": "torch.nn.Tanh"}))
    assert activation_name(info("B", tmp_path)) == "Tanh"


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_activations_are_torch_s(name: str) -> None:
    import torch

    points = [-800.0, -3.0, -0.5, 0.0, 0.5, 3.0, 800.0]
    own = getattr(torch.nn, name)()(torch.tensor(points, dtype=torch.float64)).tolist()
    assert [ACTIVATIONS[name](point) for point in points] == pytest.approx(own)
    assert sigmoid(0.0) == 0.5
    assert softplus(800.0) == 800.0
