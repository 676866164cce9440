"""Which checkpoints the generation task serves, by default or on request."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from trunkline.core.types import ModelInfo, Serves
from trunkline.plugins import generation


def info(**changes: Any) -> ModelInfo:
    fields: dict[str, Any] = {
        "path": "",
        "architecture": "LlamaForCausalLM",
        "model_type": "llama",
        "context_length": 8,
        "vocab_size": 8,
        "hidden_size": 8,
        "causal": True,
    }
    return ModelInfo(**fields | changes)


@pytest.mark.parametrize(
    ("changes", "when"),
    [
        ({}, "default"),
        ({"architecture": "GPT2LMHeadModel"}, "default"),
        ({"architecture": "BertModel", "causal": False}, "no"),
        ({"architecture": "LlamaForSequenceClassification"}, "no"),
    ],
)
def test_served_architectures(changes: dict[str, Any], when: str) -> None:
    answer = generation.trunkline_serves(info(**changes))
    assert isinstance(answer, Serves)
    assert answer.when == when
    assert bool(answer.reason) == (when != "default")


def test_a_sentence_transformers_folder_generates_on_request(tmp_path: Path) -> None:
    (tmp_path / "modules.json").write_text("[]")
    answer = generation.trunkline_serves(info(path=str(tmp_path)))
    assert isinstance(answer, Serves)
    assert answer.when == "on_request"
    assert "--task generation" in answer.reason
