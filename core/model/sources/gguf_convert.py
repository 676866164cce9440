"""Converts a Llama checkpoint in GGUF to a transformers folder: config, bf16 safetensors, tokenizer.

Run as ``python -m trunkline.core.model.sources.gguf_convert FILE FOLDER`` in a separate process, so that
the dequantised float32 tensors and transformers' parser don't use the server's memory.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch
    from gguf import GGUFReader

_PLAIN = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def convert(source: Path, folder: Path) -> None:
    """Write ``source`` (GGUF, architecture llama) into ``folder``, which must exist.

    Raises ValueError when the file holds another architecture or a tensor without a known name.
    """
    from gguf import GGUFReader

    reader = GGUFReader(source)
    architecture = _field(reader, "general.architecture")
    if architecture != "llama":
        raise ValueError(f"{source.name} holds architecture {architecture!r}; only 'llama' can be converted.")
    config = _config(reader)
    _write_config(config, folder)
    _write_weights(reader, config, folder)
    _write_tokenizer(source, config, folder)


def _field(reader: GGUFReader, key: str) -> Any:
    field = reader.get_field(key)
    if field is None:
        raise ValueError(f"the GGUF file lacks the key {key!r}")
    return field.contents()


def _config(reader: GGUFReader) -> dict[str, Any]:
    """Arguments of LlamaConfig. GGUF stores float32 numbers, so epsilon is rounded to six digits (1e-05)."""
    hidden, heads = _field(reader, "llama.embedding_length"), _field(reader, "llama.attention.head_count")
    return {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": hidden,
        "intermediate_size": _field(reader, "llama.feed_forward_length"),
        "num_hidden_layers": _field(reader, "llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": _field(reader, "llama.attention.head_count_kv"),
        "head_dim": hidden // heads,
        "vocab_size": _field(reader, "llama.vocab_size"),
        "max_position_embeddings": _field(reader, "llama.context_length"),
        "rms_norm_eps": float(f"{_field(reader, 'llama.attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_parameters": {"rope_type": "default", "rope_theta": float(_field(reader, "llama.rope.freq_base"))},
        "tie_word_embeddings": all(tensor.name != "output.weight" for tensor in reader.tensors),
        "bos_token_id": _field(reader, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": _field(reader, "tokenizer.ggml.eos_token_id"),
        "pad_token_id": _field(reader, "tokenizer.ggml.padding_token_id"),
        "dtype": "bfloat16",
    }


def _write_config(config: dict[str, Any], folder: Path) -> None:
    from transformers import GenerationConfig, LlamaConfig

    LlamaConfig(**config).save_pretrained(folder)
    special = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    GenerationConfig(**special).save_pretrained(folder)


def _write_weights(reader: GGUFReader, config: dict[str, Any], folder: Path) -> None:
    """Write every tensor in bf16; only one float32 tensor at a time is in memory."""
    import torch
    from gguf import dequantize
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {}
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        if tensor.name.endswith((".attn_q.weight", ".attn_k.weight")):
            query = tensor.name.endswith(".attn_q.weight")
            values = unpermute(values, config["num_attention_heads" if query else "num_key_value_heads"])
        tensors[hf_name(tensor.name)] = torch.from_numpy(np.array(values, order="C")).to(torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def hf_name(name: str) -> str:
    """transformers' name of a GGUF tensor: ``blk.3.attn_q.weight`` is ``model.layers.3.self_attn.q_proj.weight``."""
    if name in _PLAIN:
        return _PLAIN[name]
    match name.split("."):
        case ["blk", index, part, "weight"] if part in _LAYER:
            return f"model.layers.{index}.{_LAYER[part]}.weight"
    raise ValueError(f"the GGUF tensor {name!r} has no counterpart in a Llama checkpoint")


def unpermute(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Rows of a ``[heads * head_dim, hidden]`` projection in transformers' order.

    In GGUF, the two elements that rotary embedding rotates together are adjacent (0 1 | 2 3 | …); in transformers
    they are half a head apart.
    """
    rows, hidden = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, hidden)
    return pairs.swapaxes(1, 2).reshape(rows, hidden)


def _write_tokenizer(source: Path, config: dict[str, Any], folder: Path) -> None:
    """The tokenizer and its chat template, by transformers' own GGUF reader."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    tokenizer.model_max_length = config["max_position_embeddings"]
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
