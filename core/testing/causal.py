"""The tiny causal language models: names, classes and sizes."""

from __future__ import annotations

from typing import Any

VOCABULARY = 512
CONTEXT = 512
BOS, EOS, PAD = 1, 2, 0

DENSE = {
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
MIXED = {"head_dim": 32, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"moe_intermediate_size": 16, "num_experts": 8, "num_experts_per_tok": 2}
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
        {**MIXED, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 5.0, "query_pre_attn_scalar": 64},
    ),
    "gemma3": ("Gemma3ForCausalLM", {**MIXED, "query_pre_attn_scalar": 64}),
    "phi3": ("Phi3ForCausalLM", {}),
    "gpt-oss": (
        "GptOssForCausalLM",
        {
            **MIXED,
            "rope_parameters": _YARN,
            "intermediate_size": 16,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
    ),
    "mixtral": ("MixtralForCausalLM", {"intermediate_size": 16, "num_local_experts": 8, "num_experts_per_tok": 2}),
    "qwen2-moe": ("Qwen2MoeForCausalLM", {**EXPERTS, "shared_expert_intermediate_size": 160}),
    "qwen3-moe": ("Qwen3MoeForCausalLM", {**EXPERTS, "head_dim": 32}),
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
"""Name -> (transformers class, its config beside the common tiny sizes)."""
