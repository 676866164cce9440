"""Random checkpoints of realistic sizes, made once: ``random:llama-1b``, ``random:qwen3-moe-1b``, ``random:bert-base``.

Weights are random, so texts and vectors mean nothing; times are those of a trained model of the same shape.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from trunkline.core.model.sources import DEMO
from trunkline.core.model.sources.catalogue import fetch

RANDOM = "random:"
LLAMA_1B, MOE_1B, BERT_BASE = "random:llama-1b", "random:qwen3-moe-1b", "random:bert-base"
SMOLLM = "demo:smollm2-135m-instruct"
_FOLDER = Path(os.environ.get("TRUNKLINE_CACHE", "~/.cache/trunkline")).expanduser() / "benchmarks"


def folder_of(model: str) -> Path:
    """The folder of ``demo:NAME``, ``random:NAME`` or a path; makes or fetches what isn't there. KeyError: unknown."""
    if model.startswith(DEMO):
        return fetch(model)
    if not model.startswith(RANDOM):
        return Path(model)
    target = _FOLDER / model.removeprefix(RANDOM)
    if not target.exists():
        make = {LLAMA_1B: _llama_1b, MOE_1B: _qwen3_moe_1b, BERT_BASE: _bert_base}[model]
        _FOLDER.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=_FOLDER) as made:
            make(Path(made))
            shutil.copytree(made, target)
    return target


def _llama_1b(target: Path) -> None:
    """16 layers, 2048 wide, 8192 inner, 32 heads of 64 over 8 KV heads; SmolLM2's tokenizer. bfloat16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        **_like_smollm(),
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(target)
    _copy(fetch(SMOLLM), target, "*token*", "*.jinja", "generation_config.json")


def _qwen3_moe_1b(target: Path) -> None:
    """16 layers, 1024 wide, 16 heads of 64 over 4 KV heads, 32 experts of 768 inner, 4 for each token; SmolLM2's
    tokenizer. bfloat16."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        hidden_size=1024,
        moe_intermediate_size=768,
        num_hidden_layers=16,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=64,
        num_experts=32,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        **_like_smollm(),
    )
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(target)
    _copy(fetch(SMOLLM), target, "*token*", "*.jinja", "generation_config.json")


def _like_smollm() -> dict[str, Any]:
    """Settings that go with SmolLM2's tokenizer."""
    vocabulary = json.loads((fetch(SMOLLM) / "config.json").read_text())["vocab_size"]
    ids = {"bos_token_id": 1, "eos_token_id": 2}
    return {"vocab_size": vocabulary, "max_position_embeddings": 8192, "tie_word_embeddings": True, **ids}


def _bert_base(target: Path) -> None:
    """12 layers, 768 wide, 12 heads; all-MiniLM-L6-v2's tokenizer and pooling. float32."""
    from transformers import BertConfig, BertModel

    source = fetch("demo:all-minilm-l6-v2")
    torch.manual_seed(0)
    BertModel(BertConfig()).save_pretrained(target)
    _copy(source, target, "*token*", "vocab.txt", "modules.json", "sentence_*", "config_sentence_*")
    pooling = json.loads((source / "1_Pooling" / "config.json").read_text()) | {"word_embedding_dimension": 768}
    (target / "1_Pooling").mkdir()
    (target / "1_Pooling" / "config.json").write_text(json.dumps(pooling))


def _copy(source: Path, target: Path, *patterns: str) -> None:
    for path in {path for pattern in patterns for path in source.glob(pattern) if path.is_file()}:
        shutil.copy(path, target)
