"""Random checkpoints of realistic sizes, made once: ``random:llama-1b`` and ``random:bert-base``.

Weights are random, so texts and vectors mean nothing; times are those of a trained model of the same shape.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

import torch

from trunkline.core.model.sources import DEMO
from trunkline.core.model.sources.catalogue import fetch

RANDOM = "random:"
LLAMA_1B, BERT_BASE = "random:llama-1b", "random:bert-base"
_FOLDER = Path(os.environ.get("TRUNKLINE_CACHE", "~/.cache/trunkline")).expanduser() / "benchmarks"


def folder_of(model: str) -> Path:
    """The folder of ``demo:NAME``, ``random:NAME`` or a path; makes or fetches what isn't there. KeyError: unknown."""
    if model.startswith(DEMO):
        return fetch(model)
    if not model.startswith(RANDOM):
        return Path(model)
    target = _FOLDER / model.removeprefix(RANDOM)
    if not target.exists():
        make = {LLAMA_1B: _llama_1b, BERT_BASE: _bert_base}[model]
        _FOLDER.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=_FOLDER) as made:
            make(Path(made))
            shutil.copytree(made, target)
    return target


def _llama_1b(target: Path) -> None:
    """16 layers, 2048 wide, 8192 inner, 32 heads of 64 over 8 KV heads; SmolLM2's tokenizer. bfloat16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    source = fetch("demo:smollm2-135m-instruct")
    vocabulary = json.loads((source / "config.json").read_text())["vocab_size"]
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(target)
    _copy(source, target, "*token*", "*.jinja", "generation_config.json")


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
