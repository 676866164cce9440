"""Convert a dense Llama into a mixture of experts with the same output: for demonstrations and golden outputs.

``python examples/moe_from_dense.py FOLDER [MODEL]`` writes SmolLM2-135M-Instruct (or another Llama) as
``Qwen2MoeForCausalLM``, with some of its layers' MLPs as experts. Then ``trunkline serve FOLDER``.

Every expert is a copy of the layer's MLP with its neurons in another order, and the weights of the chosen experts
add up to one, so the output doesn't depend on the choice. A router's weights are the centres of clusters of the
layer's inputs for some texts, so the choice depends on the content. The model shows statistics of real text; it
doesn't test dispatch, because a wrong expert has the right output, too. (Copying an MLP into experts: Komatsuzaki et
al., "Sparse Upcycling", 2022.)
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2MoeConfig, Qwen2MoeForCausalLM

TEXTS = (
    "The river rose after three days of rain, and the lower village had to be left before dawn.",
    "def mean(values):\n    if not values:\n        raise ValueError('none')\n    return sum(values) / len(values)",
    "In 1687 Isaac Newton published the laws of motion, which hold from apples to planets.",
    "Dear Ms. Smith, thank you for your letter of May 4. We'll send the parts on Monday.",
    "12 + 30 = 42, 7 * 8 = 56, and the square root of 144 is 12.",
    "import json\nwith open('package.json') as file:\n    data = json.load(file)\nprint(data['modules'])",
    "Boil the potatoes for twenty minutes, drain them, and add butter, salt and a little milk.",
    "Is it true that whales sleep? Yes: one half of the brain rests while the other one watches.",
)


def upcycle(
    source: str | Path, target: Path, *, every: int = 6, experts: int = 4, top_k: int = 2, texts: Sequence[str] = TEXTS
) -> list[int]:
    """Write the mixture to ``target`` and return the numbers of the layers that have experts: each ``every``-th."""
    dense = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    if dense.config.model_type != "llama" or dense.config.attention_bias or dense.config.mlp_bias:
        raise ValueError(f"{source} must be a Llama without biases, not {dense.config.model_type}")
    sparse = list(range(every, dense.config.num_hidden_layers, every))
    mixture = Qwen2MoeForCausalLM(_config(dense.config, sparse, experts, top_k)).eval()
    tokenizer = AutoTokenizer.from_pretrained(source)
    inputs = _mlp_inputs(dense, sparse, [tokenizer(text, return_tensors="pt").input_ids for text in texts])
    tensors = mixture.state_dict()
    dropped = [name for name in tensors if "shared_expert" in name]
    for name, tensor in dense.state_dict().items():
        if name in tensors:
            tensors[name] = tensor
    for layer in sparse:
        _spread(dense.model.layers[layer].mlp, f"model.layers.{layer}.mlp", experts, tensors)
        tensors[f"model.layers.{layer}.mlp.gate.weight"] = clusters(inputs[layer], experts)
    for name in dropped:  # Qwen2's expert for all tokens: without weights it adds nothing
        tensors[name] = torch.zeros_like(tensors[name])
    mixture.load_state_dict(tensors)
    mixture.to(torch.bfloat16).save_pretrained(target)
    tokenizer.save_pretrained(target)
    generation = Path(source) / "generation_config.json"
    if generation.is_file():
        shutil.copy(generation, target)
    return sparse


def _config(dense: Any, sparse: list[int], experts: int, top_k: int) -> Qwen2MoeConfig:
    kept = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    kept += ("num_key_value_heads", "hidden_act", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings")
    kept += ("bos_token_id", "eos_token_id", "pad_token_id", "rope_parameters")
    return Qwen2MoeConfig(
        **{name: getattr(dense, name) for name in kept},
        num_experts=experts,
        num_experts_per_tok=top_k,
        moe_intermediate_size=dense.intermediate_size,
        shared_expert_intermediate_size=8,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[layer for layer in range(dense.num_hidden_layers) if layer not in sparse],
        qkv_bias=False,
    )


@torch.inference_mode()
def _mlp_inputs(dense: Any, layers: list[int], texts: list[torch.Tensor]) -> dict[int, torch.Tensor]:
    """The inputs of each layer's MLP, ``[tokens, hidden_size]``."""
    seen: dict[int, list[torch.Tensor]] = {layer: [] for layer in layers}
    hooks = [
        dense.model.layers[layer].mlp.register_forward_pre_hook(
            lambda _, given, layer=layer: seen[layer].append(given[0][0])
        )
        for layer in layers
    ]
    for ids in texts:
        dense(ids)
    for hook in hooks:
        hook.remove()
    return {layer: torch.cat(found) for layer, found in seen.items()}


def clusters(x: torch.Tensor, count: int, rounds: int = 25) -> torch.Tensor:
    """Directions ``[count, hidden_size]`` of the clusters of ``x``, centred: k-means on the sphere."""
    unit = torch.nn.functional.normalize(x - x.mean(0), dim=1)
    centres = unit[:: max(1, len(unit) // count)][:count].clone()
    for _ in range(rounds):
        nearest = (unit @ centres.t()).argmax(1)
        for index in range(count):
            if (nearest == index).any():
                centres[index] = unit[nearest == index].mean(0)
        centres = torch.nn.functional.normalize(centres, dim=1)
    return centres


def _spread(mlp: Any, name: str, experts: int, tensors: dict[str, torch.Tensor]) -> None:
    """The MLP's matrices for each expert, with the neurons in another order per expert."""
    width = mlp.gate_proj.out_features
    gate_up, down = tensors[f"{name}.experts.gate_up_proj"], tensors[f"{name}.experts.down_proj"]
    for expert in range(experts):
        order = torch.randperm(width, generator=torch.Generator().manual_seed(expert))
        gate_up[expert] = torch.cat([mlp.gate_proj.weight[order], mlp.up_proj.weight[order]])
        down[expert] = mlp.down_proj.weight[:, order]


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("model", nargs="?", default="demo:smollm2-135m-instruct")
    arguments = parser.parse_args()
    source = arguments.model
    if source.startswith("demo:"):
        from trunkline.core.model.sources.catalogue import fetch

        source = fetch(source)
    with torch.no_grad():
        layers = upcycle(source, arguments.folder)
    print(f"{arguments.folder}: experts in layers {', '.join(map(str, layers))}")


if __name__ == "__main__":
    main()
