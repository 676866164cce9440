"""GGUF files of small models, written with the package ``gguf`` as llama.cpp's converter writes them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers

from trunkline.core.testing import build_checkpoint

LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
}
PLAIN = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def paired(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows in Llama's order of GGUF: the two numbers that rotary embedding rotates together are neighbours."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1)
    return halves.swapaxes(1, 2).reshape(weight.shape)


def separate(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers' tensors, with gates and others of experts apart as in GGUF."""
    found: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith("experts.gate_up_proj"):
            layer = name.removesuffix("gate_up_proj")
            found |= dict(zip((f"{layer}gate", f"{layer}up"), tensor.chunk(2, 1), strict=True))
        else:
            found[name.replace("experts.down_proj", "experts.down")] = tensor
    return found


def merge_experts(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The counterpart of :func:`separate`."""
    found: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith("experts.gate"):
            both = tensor, tensors[f"{name.removesuffix('gate')}up"]
            found[f"{name}_up_proj"] = torch.cat(both, 1)
        elif not name.endswith("experts.up"):
            found[name.replace("experts.down", "experts.down_proj")] = tensor
    return found


def name_in_gguf(name: str) -> str:
    if ".experts." in name:
        _, _, layer, _, _, part = name.split(".")
        return f"blk.{layer}.ffn_{part}_exps.weight"
    stem, _, suffix = name.rpartition(".")
    if stem in PLAIN:
        return f"{PLAIN[stem]}.{suffix}"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{LAYER[part]}.{suffix}"


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A checkpoint by its name in the zoo, without scaling of its rotary embedding, for which GGUF has no key."""
    made: dict[str, Path] = {}

    def build(name: str) -> Path:
        if name not in made:
            rope = {"rope_type": "default", "rope_theta": 10000.0}
            experts = {"moe_intermediate_size": 64, "norm_topk_prob": True} if "moe" in name else {}
            folder = tmp_path_factory.mktemp("gguf") / name
            made[name] = build_checkpoint(name, folder, rope_parameters=rope, **experts)
        return made[name]

    return build


@pytest.fixture(scope="session")
def write_gguf(checkpoint: Callable[[str], Path]) -> Callable[..., dict[str, torch.Tensor]]:
    """``write_gguf(file, name, type)``: a checkpoint as GGUF; returns its tensors as they come back from it.

    ``values``: the type of matrices that make values, by default the same.
    """

    def write(
        file: Path,
        name: str = "llama",
        kind: str = "Q8_0",
        extra: dict[str, np.ndarray] | None = None,
        values: str | None = None,
    ) -> dict[str, torch.Tensor]:
        model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint(name), dtype=torch.float32)
        config, architecture = model.config, model.config.model_type.replace("_", "")
        writer = gguf.GGUFWriter(file, architecture)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        writer.add_vocab_size(config.vocab_size)
        if experts := getattr(config, "num_experts", None):
            writer.add_expert_count(experts)
            writer.add_expert_used_count(config.num_experts_per_tok)
            writer.add_expert_feed_forward_length(config.moe_intermediate_size)
        add_tokenizer(writer, checkpoint(name))
        stored: dict[str, torch.Tensor] = {}
        for full, parameter in separate(model.state_dict()).items():
            if full == "lm_head.weight" and config.tie_word_embeddings:
                continue
            numbers, wanted = parameter.numpy(), kind if parameter.ndim > 1 and "mlp.gate." not in full else "F32"
            if values is not None and "v_proj" in full:
                wanted = values
            heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
            count = next((number for part, number in heads.items() if part in full and architecture == "llama"), 0)
            quantised = gguf.GGMLQuantizationType[wanted]
            data = gguf.quantize(paired(numbers, count) if count else numbers, quantised)
            writer.add_tensor(name_in_gguf(full), data, raw_dtype=quantised)
            stored[full] = torch.from_numpy(gguf.dequantize(gguf.quantize(numbers, quantised), quantised).copy())
        for full, numbers in (extra or {}).items():
            writer.add_tensor(full, numbers)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return stored

    return write


def add_tokenizer(writer: Any, folder: Path) -> None:
    """The folder's byte-level BPE, as llama.cpp has it."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = {**tokenizer["model"]["vocab"], **{one["content"]: one["id"] for one in tokenizer["added_tokens"]}}
    special = {one["content"] for one in tokenizer["added_tokens"]}
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    merges = [one if isinstance(one, str) else " ".join(one) for one in tokenizer["model"]["merges"]]
    writer.add_token_merges(merges or ["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}")
