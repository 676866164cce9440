"""Tiny configs for any transformers class, to test many classes in little time.

Sizes are found by their names in config classes. Windows and similar limits are :data:`LIMIT` tokens: longer than the
sequences with which a model is checked at load, shorter than :data:`CONTEXT`. Multipliers and soft caps get values
with which omitting one changes the results.
"""

from __future__ import annotations

from typing import Any

CONTEXT = 512
LIMIT = 32

_SIZES: dict[Any, str] = {
    CONTEXT: "vocab_size vocab_size_per_layer_input decoder_vocab_size max_position_embeddings n_positions n_ctx "
    "seq_length max_seq_len model_max_length context_length max_sequence_length max_target_positions",
    LIMIT: "sliding_window sliding_window_size window_size attention_chunk_size attention_window_size attention_window "
    "local_attention local_attention_window_len index_topk floor_scale log_scaling_n_floor rel_extent q_lora_rank",
    96: "intermediate_size n_inner ffn_dim hidden_dim d_ff dim_ff encoder_ffn_dim decoder_ffn_dim ffn_hidden_size "
    "intermediate_size_mlp dense_intermediate_size d_inner feed_forward_size shared_expert_intermediate_size "
    "shared_intermediate_size moe_shared_expert_intermediate_size",
    64: "hidden_size n_embd d_model dim dim_model emb_dim embed_dim embedding_size input_embedding_size "
    "output_embedding_size word_embed_proj_dim embedding_dim attention_hidden_size pooler_hidden_size "
    "true_hidden_size intra_bottleneck_size prediction_head_size projection_dim backbone_hidden_size shape_embed_dim "
    "pronunciation_embed_dim lru_width d_latents encoder_hash_byte_group_vocab",
    24: "kv_lora_rank",
    16: "head_dim d_head d_kv dim_head kv_channels swa_head_dim global_head_dim attention_head_dim attention_head_size "
    "v_head_dim qk_nope_head_dim qk_rope_head_dim index_head_dim indexer_head_dim swa_v_head_dim linear_head_dim "
    "linear_key_head_dim linear_value_head_dim mamba_head_dim mamba_d_head hidden_size_per_layer_input ple_embed_dim "
    "moe_intermediate_size expert_ffn_hidden_size expert_dim entity_vocab_size",
    8: "num_experts num_local_experts n_routed_experts moe_num_experts zero_expert_num rotary_dim laurel_rank "
    "index_block_size mamba_n_heads mamba_num_heads num_latents prompt_types",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads attention_heads "
    "num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads num_self_attention_heads "
    "num_cross_attention_heads index_n_heads indexer_n_heads linear_num_key_heads linear_num_value_heads block_size",
    2: "num_hidden_layers n_layer n_layers num_layers depth encoder_layers decoder_layers num_encoder_layers "
    "num_decoder_layers num_layers_per_stack num_blocks num_key_value_heads n_head_kv num_kv_heads kv_n_heads "
    "swa_num_key_value_heads num_global_key_value_heads num_query_groups num_experts_per_tok num_experts_per_token "
    "moe_topk moe_top_k top_k_experts experts_per_token n_group num_expert_group index_topk_blocks altup_num_inputs",
    1: "topk_group first_k_dense_replace num_dense_layers num_shared_experts n_shared_experts moe_num_shared_experts "
    "index_local_blocks",
    3.0: "embedding_multiplier scale_emb embedding_scale logits_mup_width_multiplier",
    0.5: "residual_multiplier logits_scaling logit_scale lm_head_multiplier",
    0.1: "attention_multiplier",
    5.0: "final_logit_softcapping attn_logit_softcapping",
    1.5: "routed_scaling_factor route_scale",
}
SIZES = {name: size for size, names in _SIZES.items() for name in names.split()}
# Set also if their default is None: they would be derived from large sizes.
_EVEN_IF_NONE = {"vocab_size", "head_dim", "num_attention_heads", "num_experts", "n_routed_experts"} | {
    "num_experts_per_tok",
    "moe_intermediate_size",
    "n_shared_experts",
}
_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_HYBRID = {"layer_types": ["mamba", "hybrid", "hybrid"], "num_hidden_layers": 3}
_SINGLE = {"num_key_value_heads": 4}  # no grouped queries
_SECTIONS = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}  # of half a head's width
_HALF = {"rope_parameters": {**_SECTIONS, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}}
# Values that the rules above get wrong, by model type.
_OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_d_head": 16},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2}},
    "dots3_note_text": _SINGLE,
    "esmc": _SINGLE,
    "falcon_h1": {"mamba_d_ssm": 128},
    "gemma3n_text": {"num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.0, 0.0]},
    "gemma4_text": {"num_kv_shared_layers": 1, "layer_types": ["full_attention"] * 2},
    "glm5_next_text": {**_SINGLE, "qk_rope_head_dim": 0},
    "glm4v_moe_text": _HALF,
    "glm4v_text": _HALF,
    "glm_image_text": _HALF,
    "glm_ocr_text": _HALF,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "lfm2_moe": {"layer_types": ["full_attention", "conv"]},
    "lilt": {"hidden_size": 96, "pad_token_id": 1},
    "mamba2": {"num_heads": 8},
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse"]},
    "mistral4": {"head_dim": 32},
    "mpnet": {"pad_token_id": 1},
    "nemotron": {"num_key_value_heads": 2},
    "qwen2_5_vl_text": {"rope_parameters": _SECTIONS},
    "qwen2_vl_text": {"rope_parameters": _SECTIONS},
    "qwen4_exp_text": {"indexer_kv_heads": 1, "indexer_n_heads": 4, "indexer_head_dim": 16, "indexer_budget": LIMIT}
    | {"indexer_compress_ratio": 2},
    "reformer": {"axial_pos_embds_dim": [16, 48], "axial_pos_shape": [16, 32]},
    "xmod": {"default_language": "en_XX"},
    "zamba": _HYBRID,
    "zamba2": _HYBRID,
    "zaya": {"num_experts_per_tok": 1},
}


def tiny_config(cls: Any, **given: Any) -> Any:
    """A small instance of a transformers config class, with the values ``given``.

    Raises the class's exception if it can't combine these sizes.
    """
    default = cls()
    known: dict[str, Any] = default.to_dict()
    own = {name: SIZES[name] for name in known if name in SIZES and (known[name] is not None or name in _EVEN_IF_NONE)}
    values: dict[str, Any] = {**own, **_TOKENS}
    for name in cls.sub_configs:
        inner = getattr(default, name, None)
        if inner is not None and not isinstance(inner, dict):
            values[name] = tiny_config(type(inner))
    if "kv_lora_rank" in values and "num_key_value_heads" in values:  # latent attention: one KV head per query head
        values["num_key_value_heads"] = values["num_attention_heads"]
    values |= _layers(known) | _rope(known, values.get("head_dim", 16)) | _OVERRIDES.get(cls.model_type, {}) | given
    return cls(**values)


def _layers(known: dict[str, Any]) -> dict[str, Any]:
    """At least two layers, with at least one of each kind."""
    values: dict[str, Any] = {}
    if kinds := list(dict.fromkeys(known.get("layer_types") or ())):
        values["layer_types"] = kinds * 2 if len(kinds) == 1 else kinds
        values["num_hidden_layers"] = len(values["layer_types"])
    if kinds := list(dict.fromkeys(known.get("mlp_layer_types") or ())):
        count = values.get("num_hidden_layers", 2)
        values["mlp_layer_types"] = (kinds * count)[:count]
    return values


def _rope(known: dict[str, Any], width: int) -> dict[str, Any]:
    """Rotary parameters whose sections (of multimodal positions) fit the heads' width."""
    rope = known.get("rope_parameters")
    if not isinstance(rope, dict) or "mrope_section" not in rope:
        return {}
    half = int(width * rope.get("partial_rotary_factor", 1.0)) // 2
    return {"rope_parameters": {**rope, "mrope_section": [half - 2 * (half // 3), half // 3, half // 3]}}
