"""The plugin author's kit: tiny checkpoints that behave like big ones where it matters.

Also a pytest plugin: ``pytest_plugins = ["trunkline.core.testing"]`` in the root conftest gives the
fixture ``zoo``, a function from an architecture's name (:data:`ZOO`) to a local folder.

Default initialisation makes tiny models insensitive: reordering the context moves nothing, and
forgotten biases pass because they are zero. So matrices have standard deviation 1/sqrt(fan in),
norms and biases are noise, windows are 8 tokens, soft caps bite and rope scaling is on. The final
norm is large, so that logits spread, and embeddings are small, so that tied ones don't just repeat
the last token.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    import torch

VOCABULARY = 512
CONTEXT = 512
BOS, EOS, PAD = 1, 2, 0
SPREAD = 3.0  # standard deviation of the logits
SPECIALS = ("<pad>", "<s>", "</s>", "<unk>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)

_DENSE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
_MIXED = {"head_dim": 32, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
_EXPERTS = {"moe_intermediate_size": 16, "num_experts": 8, "num_experts_per_tok": 2}
_LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 48,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 16,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "routed_scaling_factor": 1.5,
}

ZOO: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {"rope_parameters": _LLAMA3}),
    "llama-tied": ("LlamaForCausalLM", {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2ForCausalLM", {}),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 32}),
    "mistral-sliding": ("MistralForCausalLM", {"sliding_window": 8}),
    "gemma2": (
        "Gemma2ForCausalLM",
        {**_MIXED, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 5.0, "query_pre_attn_scalar": 64},
    ),
    "gemma3": ("Gemma3ForCausalLM", {**_MIXED, "query_pre_attn_scalar": 64}),
    "phi3": ("Phi3ForCausalLM", {}),
    "gpt-oss": (
        "GptOssForCausalLM",
        {
            **_MIXED,
            "rope_parameters": _YARN,
            "intermediate_size": 16,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
    ),
    "mixtral": ("MixtralForCausalLM", {"intermediate_size": 16, "num_local_experts": 8, "num_experts_per_tok": 2}),
    "qwen2-moe": ("Qwen2MoeForCausalLM", {**_EXPERTS, "shared_expert_intermediate_size": 160}),
    "qwen3-moe": ("Qwen3MoeForCausalLM", {**_EXPERTS, "head_dim": 32}),
    "olmoe": (
        "OlmoeForCausalLM",
        {"num_key_value_heads": 4, "intermediate_size": 16, "num_experts": 8, "num_experts_per_tok": 2},
    ),
    "deepseek-v2": ("DeepseekV2ForCausalLM", {**_LATENT, "topk_method": "group_limited_greedy"}),
    "deepseek-v3": ("DeepseekV3ForCausalLM", {**_LATENT, "rope_parameters": _YARN}),
    "llama4": (
        "Llama4ForCausalLM",
        {
            "head_dim": 32,
            "intermediate_size": 16,
            "intermediate_size_mlp": 192,
            "num_local_experts": 8,
            "attention_chunk_size": 8,
            "no_rope_layers": [1, 0],
            "attn_temperature_tuning": False,
        },
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        {
            "n_embd": 128,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": CONTEXT,
            "num_key_value_heads": 4,
            "scale_attn_by_inverse_layer_idx": True,
        },
    ),
    "granite": (
        "GraniteForCausalLM",
        {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 0.5, "attention_multiplier": 0.1},
    ),
    "cohere": ("CohereForCausalLM", {"logit_scale": 0.5}),
}
"""Name -> (transformers class, what its config has beyond the common tiny sizes)."""


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function from a name in :data:`ZOO` to the folder of its checkpoint, built at the first call."""
    root = tmp_path_factory.mktemp("zoo")

    def checkpoint(name: str) -> Path:
        folder = root / name
        return folder if folder.is_dir() else build_checkpoint(name, folder)

    return checkpoint


def build_checkpoint(name: str, folder: Path, **overrides: Any) -> Path:
    """Write the tiny float32 checkpoint ``name`` with a tokenizer to ``folder``; the same bytes on every run.

    ``overrides`` go into its config.
    """
    import torch
    import transformers

    architecture, own = ZOO[name]
    cls = getattr(transformers, architecture)
    config = cls.config_class(**{**_DENSE, **own, **overrides})
    config.architectures = [architecture]
    with torch.random.fork_rng(devices=[]):
        model = cls(config).float()
        randomize(model, seed=sorted(ZOO).index(name))
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def randomize(model: torch.nn.Module, seed: int = 0) -> None:
    """Give every parameter and persistent buffer a value that shows when it is left out."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    offset = 1.0 if "Gemma" in type(model).__name__ else 0.0  # Gemma stores norm weights minus one
    embeddings = model.get_input_embeddings().weight  # type: ignore[operator]
    tied = embeddings is model.get_output_embeddings().weight  # type: ignore[operator]
    small = 0.02 if tied else 0.1
    large = SPREAD / (small * embeddings.shape[1] ** 0.5) if tied else SPREAD
    with torch.no_grad():
        for name, tensor in model.state_dict(keep_vars=True).items():
            if not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if tensor is embeddings or name.endswith("wpe.weight"):
                tensor.copy_(small * noise)
            elif name.endswith(("norm.weight", "ln_1.weight", "ln_2.weight", "ln_f.weight")):
                final = name.endswith(("model.norm.weight", "ln_f.weight"))
                tensor.copy_((large if final else 1.0) * (1.0 + 0.3 * noise) - offset)
            elif tensor.ndim < 2 or name.endswith("bias"):
                tensor.copy_(0.3 * noise)
            else:
                tensor.copy_(noise / _fan_in(name, tensor) ** 0.5)


def _fan_in(name: str, tensor: torch.Tensor) -> int:
    """Inputs of a matrix: the last axis of a Linear, the first of GPT-2's, either of experts'."""
    if tensor.ndim == 3:  # some architectures transpose, but the hidden size is always the larger
        return min(tensor.shape[1:]) if "down_proj" in name else max(tensor.shape[1:])
    return tensor.shape[0] if name.startswith("transformer.h.") else tensor.shape[1]


def write_tokenizer(folder: Path) -> None:
    """A byte-level BPE tokenizer of :data:`VOCABULARY` entries with a chat template, built by hand.

    Its merges are arithmetic, not trained: common English pairs first, then pairs of letters.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate((*SPECIALS, *alphabet))}
    merges: list[tuple[str, str]] = []
    letters = "etaoinshrdlu"
    for left in ("Ġ", *letters):
        for right in letters:
            if len(vocabulary) < VOCABULARY and left + right not in vocabulary:
                vocabulary[left + right] = len(vocabulary)
                merges.append((left, right))
    while len(vocabulary) < VOCABULARY:  # a model's vocabulary may be larger than its tokenizer's
        vocabulary[f"<reserved {len(vocabulary)}>"] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIALS))
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONTEXT,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
