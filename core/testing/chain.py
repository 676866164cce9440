"""Writes the additional files of a sentence-transformers folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .checkpoints import Chain

# Name of a mode -> its key in 1_Pooling/config.json.
KEYS = {
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
    "mean": "pooling_mode_mean_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}


def write_chain(folder: Path, hidden: int, chain: Chain, seed: int = 0) -> None:
    """Write modules.json and the folders of its modules; ``hidden`` is the model's hidden size."""
    modules = [("", "Transformer")]
    settings = {"max_seq_length": chain.max_tokens, "do_lower_case": False} if chain.max_tokens else {}
    if settings:
        _write(folder / "sentence_bert_config.json", settings)
    width = hidden * len(chain.pooling)
    _write(
        _add(folder, modules, "Pooling"),
        {"word_embedding_dimension": hidden, **{key: mode in chain.pooling for mode, key in KEYS.items()}},
    )
    for number, (out, activation) in enumerate(chain.dense):
        _write_dense(_add(folder, modules, "Dense"), width, out, activation, seed + number)
        width = out
    if chain.normalize:
        _add(folder, modules, "Normalize")
    listing = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for index, (path, kind) in enumerate(modules)
    ]
    _write(folder / "modules.json", listing)
    own = {"prompts": chain.prompts, "default_prompt_name": None, "similarity_fn_name": "cosine"}
    _write(folder / "config_sentence_transformers.json", own)


def _add(folder: Path, modules: list[tuple[str, str]], kind: str) -> Path:
    """Append a module to the list and make its folder. Returns the path for its config."""
    path = f"{len(modules)}_{kind}"
    modules.append((path, kind))
    (folder / path).mkdir()
    return folder / path / "config.json"


def _write_dense(config: Path, width: int, out: int, activation: str, seed: int) -> None:
    import torch
    from safetensors.torch import save_file

    module = "linear" if activation == "Identity" else "activation"
    _write(config, {
        "in_features": width,
        "out_features": out,
        "bias": True,
        "activation_function": f"torch.nn.modules.{module}.{activation}",
    })  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, width, generator=generator) / width**0.5
    bias = 0.1 * torch.randn(out, generator=generator)
    save_file({"linear.weight": weight, "linear.bias": bias}, config.with_name("model.safetensors"))


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")
