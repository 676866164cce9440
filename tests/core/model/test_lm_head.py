"""The language model head by hand gives what the class's own forward gives, also where forward does more."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from trunkline.core import Engine
from trunkline.core.model.lm_head import HEAD

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
        assert HEAD.reference is not None
        torch.testing.assert_close(HEAD.build(model)(hidden), HEAD.reference(model, ids))


@pytest.mark.field
@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere", "granite"])
def test_the_head_is_there_whatever_tasks_run(name: str, zoo: Callable[[str], Path]) -> None:
    with Engine(str(zoo(name)), dtype="float32", threads=1, task=("embedding",)) as engine:
        (lane,) = engine.client.transport.loop.lanes
        assert list(lane.stages) == ["embedding"]
        assert "lm" in lane.model.heads
