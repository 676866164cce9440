"""The head by hand gives what the class's own forward gives, also where forward does more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from trunkline.core.types import ModelInfo, Serves
from trunkline.plugins import generation
from trunkline.plugins.generation.heads import LM_HEAD

TINY: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "pad_token_id": 0,
}
GPT2: dict[str, Any] = {"vocab_size": 64, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 32}


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("Llama", TINY),
        ("Llama", TINY | {"tie_word_embeddings": True}),
        ("Gemma2", TINY | {"final_logit_softcapping": 3.0}),
        ("Cohere", TINY | {"logit_scale": 0.25}),
        ("Granite", TINY | {"logits_scaling": 8.0}),
        ("GPT2", GPT2),
    ],
)
def test_the_head_is_the_class_s_own(family: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**options)
    name = "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
    model = getattr(transformers, name)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
        ids = torch.randint(0, 64, (1, 9))
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, -1]
        assert LM_HEAD.reference is not None
        torch.testing.assert_close(LM_HEAD.build(model)(hidden), LM_HEAD.reference(model, ids))


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
        ({"is_embedding": True}, "on_request"),
        ({"architecture": "BertModel", "causal": False}, "no"),
        ({"architecture": "LlamaForSequenceClassification"}, "no"),
    ],
)
def test_what_is_served(changes: dict[str, Any], when: str) -> None:
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
