"""Models of real sizes with random weights, which are made on the device: no checkpoint is downloaded or written.

The module is a plugin: the engine asks its hook for the tensors of a folder that has nothing but a config.json.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

from trunkline.core.hookspecs import hookimpl
from trunkline.core.types import ModelSource

RESIDUAL = ("o_proj", "down_proj", "output.dense")  # parts of the names of matrices whose results are added to rows
RESIDUAL_SCALE = 0.1  # so that deep random models keep rounding errors small, as trained ones do
CONTEXT = 8192

LLAMA_8B: dict[str, Any] = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
QWEN3_30B_A3B: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
}
BERT_LARGE: dict[str, Any] = {
    "vocab_size": 30522,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
}
TINY: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "moe_intermediate_size": 32,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}


def write_config(folder: Path, architecture: str, sizes: dict[str, Any], dtype: torch.dtype) -> None:
    """Write the config.json of a transformers class; sizes that the class doesn't have are left out."""
    kind = getattr(transformers, architecture).config_class
    known = kind().to_dict()
    own = {name: size for name, size in sizes.items() if name in known or name == "head_dim"}
    context = 512 if architecture.startswith("Bert") else CONTEXT
    config = kind(**own, max_position_embeddings=context, architectures=[architecture], dtype=dtype)
    config.save_pretrained(folder)


@hookimpl
def trunkline_weights(source: ModelSource) -> Iterator[tuple[str, torch.Tensor]]:
    """Random tensors on the GPU, or on the CPU if there is none, in the dtype of the config."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = transformers.AutoConfig.from_pretrained(source.path, local_files_only=True)
    with torch.device("meta"):
        whole = getattr(transformers, config.architectures[0])(config)
    generator = torch.Generator(device).manual_seed(0)
    for name, tensor in whole.state_dict().items():
        yield name, random_tensor(name, tensor.shape, config.dtype, generator)


def random_tensor(name: str, shape: torch.Size, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Matrices that keep the size of rows, norms of 1, biases of 0."""
    device = generator.device
    if len(shape) < 2:
        return torch.full(shape, 1.0 if name.endswith("weight") else 0.0, dtype=dtype, device=device)
    scale = 1.0 if "embed" in name else float(shape[-1] ** -0.5)
    if any(part in name for part in RESIDUAL):
        scale *= RESIDUAL_SCALE
    return torch.randn(shape, dtype=dtype, device=device, generator=generator).mul_(scale)
